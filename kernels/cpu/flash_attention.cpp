// Flash attention, forward, on a CPU: out = softmax(softmax_scale · Q Kᵀ + mask) V, computed in fp32.
//
// Queries lie in vector lanes, so that the softmax needs no horizontal operation and a mask is a compare:
//
//     for each tile of 64 queries (one (batch, head); the unit of work that threads draw from a counter)
//         Qt[d][64] = transpose(Q);  O[e][64] = sum[64] = 0;  top[64] = lowest;  scale = softmax_scale · log2(e)
//         for each block of keys that some query of the tile sees
//             S[key][64]   = K · Qt                                multiply(): A is K as it lies in memory
//             S            = -inf where masked                     only in blocks that straddle an edge
//             top'         = max(top, S);  alpha = exp2((top - top') · scale)
//             S            = exp2((S - top') · scale);  sum = sum · alpha + Σ S
//             O[e][64]     = O · alpha + Vᵀ · S                    multiply(): A is V as it lies in memory
//         out = transpose(O / sum)
//
// A tile is cut into panels of VECS vectors: 4 × 16 lanes with AVX-512 (one panel), 2 × 8 with AVX2 (four). The lanes
// of a panel lie together: Qt is [panel][d][lane], O [panel][e][lane]. multiply() keeps 6 rows × VECS vectors of the
// result in registers and broadcasts the elements of A. It sums a block from zero and adds that to O: the rescale
// by alpha costs no pass of its own, and the error of a sum over n keys grows with n / KEYS + KEYS, not with n.
// Q is not scaled beforehand: at logits up to ±100, rounding its elements again made the worst error 1.4 times larger.
//
// exp2(x) is 2ⁿ · p(r) with x = n + r, |r| ≤ 1/2 and p of degree 6, p(0) = 1. Its relative error is below 8.0e-8 with
// FMA and 1.1e-7 without (0.95 and 1.2 ulp; every 8th float of [-126, 0] measured), of which 2.0e-9 are p's own.
// Below -126, and for -inf, it is 0; NaN stays NaN.
//
// By hand: g++ -O3 -std=c++17 -fPIC -shared -pthread -Wall -Wextra -march=native flash_attention.cpp -o flash.so
// (g++ ≥ 11, clang ≥ 15; x86-64 and Arm, for they differ in LANES and MICRO_VECS alone). -ffast-math breaks it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <limits>
#include <thread>
#include <type_traits>

// Strides count elements; the last dimension has stride 1. Mirrored by FlashArgs in plugins/jit_flash/cpu.py.
struct flash_args {
    const void *q, *k, *v;
    void *out, *workspace;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, sequence
    int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    int64_t window;  // a query sees keys less than this away from its own position; 0: all
    double softmax_scale;
    int32_t dtype;   // 0 fp32, 1 fp16, 2 bf16: of q, k, v and out
    int32_t causal;  // not 0: no key after the query's own position, seqlen_q and seqlen_k aligned at their ends
    int32_t threads;  // at most; never more than there are tiles
};

enum flash_status : int { FLASH_DONE, FLASH_BAD_SHAPE, FLASH_BAD_DTYPE, FLASH_BAD_THREADS, FLASH_NULL_POINTER };

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MICRO_VECS = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int LANES = 8, MICRO_VECS = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, MICRO_VECS = 4;  // 24 of 32
#else
constexpr int LANES = 4, MICRO_VECS = 2;  // 12 of 16
#endif
constexpr int MICRO_ROWS = 6;
// Queries of a tile. On an Ice Lake core at 512 × 2048, d = 128, 128 is 2 % faster in fp32 and 8 % in fp16, whose keys
// are then converted half as often; but 128 queries would leave all cores but one idle.
constexpr int TILE = 64;
// Keys of a block. There 48 to 192 are within 2 % of each other at d = 128, but at d = 64 192 is 5 % slower than 96,
// whose S (24 KiB) leaves more of L1. Fewer blocks make longer sums more accurate: over 8192 positive values and more
// the error, as a share of twice that of unfused fp32 attention, was up to 0.8 with 192 keys, 0.9 with 144, 1 with 96.
constexpr int KEYS = 144;
constexpr int MAX_DIM = 256;
constexpr int MAX_THREADS = 1024;
constexpr int64_t ALIGNMENT = 128;  // bytes: two cache lines, for they are fetched in pairs

// may_alias: the scratch is filled lane by lane and read vector by vector.
typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), may_alias));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LOG2_E = 1.4426950408889634;

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Conversions are integer arithmetic: compilers vectorise it, and g++ 11 has no _Float16 in C++.
inline float widen(float x) { return x; }
inline float widen(bfloat x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(half x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // subnormals come out right too
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(finite | special | (x.bits & 0x8000u) << 16);
}

// To nearest, ties to even; NaN stays NaN.
template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bfloat narrow<bfloat>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16)};
}
template <> inline half narrow<half>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // A half's subnormals are multiples of 2^-24, and so is the last bit of a float at 0.5.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u))};
}

inline vec broadcast(float x) { return vec{} + x; }
inline vec maximum(vec a, vec b) { return a > b ? a : b; }

inline vec exp2(vec x) {
    constexpr float MAGIC = 0x1.8p23f;  // at this size a float's last bit is 1, so adding it rounds to an integer
    const vec shifted = x + MAGIC, r = x - (shifted - MAGIC);
    vec p = r * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
    p = p * r + 0x1.3b2d4cp-7f;
    p = p * r + 0x1.c6aee8p-5f;
    p = p * r + 0x1.ebfbdcp-3f;
    p = p * r + 0x1.62e430p-1f;
    p = p * r + 1.0f;
    const uvec power = (reinterpret_cast<uvec>(shifted) + 127u) << 23;  // MAGIC's own bits leave at the top
    return x < -126.0f ? vec{} : p * reinterpret_cast<vec>(power);
}

// C[row][lane] = Σ over step < depth of A(row, step) · B[step][lane], for ROWS rows and VECS vectors of lanes, where
// A(row, step) = a[row · row_stride + step · step_stride]. With alpha, C · alpha is added.
template <int ROWS, int VECS>
inline void micro_kernel(const float* a, int64_t row_stride, int64_t step_stride, int64_t depth, const vec* b, vec* c,
                         const vec* alpha) {
    vec sum[ROWS][VECS] = {};
    for (int64_t step = 0; step < depth; ++step)
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
            for (int i = 0; i < VECS; ++i)
                sum[row][i] += a[row * row_stride + step * step_stride] * b[step * VECS + i];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
        for (int i = 0; i < VECS; ++i)
            c[row * VECS + i] = alpha ? c[row * VECS + i] * alpha[i] + sum[row][i] : sum[row][i];
}

// micro_kernel over any number of rows. Inlined, for one of the strides is 1 in each of its two uses.
template <int VECS>
[[gnu::always_inline]] inline void multiply(const float* a, int64_t row_stride, int64_t step_stride, int64_t rows,
                                            int64_t depth, const vec* b, vec* c, const vec* alpha) {
    int64_t row = 0;
    for (; row + MICRO_ROWS <= rows; row += MICRO_ROWS)
        micro_kernel<MICRO_ROWS, VECS>(a + row * row_stride, row_stride, step_stride, depth, b, c + row * VECS, alpha);
    a += row * row_stride;
    c += row * VECS;
    switch (rows - row) {
        case 5: return micro_kernel<5, VECS>(a, row_stride, step_stride, depth, b, c, alpha);
        case 4: return micro_kernel<4, VECS>(a, row_stride, step_stride, depth, b, c, alpha);
        case 3: return micro_kernel<3, VECS>(a, row_stride, step_stride, depth, b, c, alpha);
        case 2: return micro_kernel<2, VECS>(a, row_stride, step_stride, depth, b, c, alpha);
        case 1: return micro_kernel<1, VECS>(a, row_stride, step_stride, depth, b, c, alpha);
    }
}

// One thread's share of the workspace.
struct Scratch {
    vec *q, *o, *s;   // Qt, O and one panel of S
    float *k, *v;     // a block of keys and values in fp32, for inputs that are not

    static int64_t bytes(const flash_args& args) {
        const int64_t dims = args.head_dim + args.head_dim_v;
        const int64_t floats = dims * TILE + KEYS * TILE + (args.dtype ? dims * KEYS : 0);
        return (floats * int64_t{sizeof(float)} + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

    Scratch(const flash_args& args, char* memory) {
        float* next = reinterpret_cast<float*>(memory);
        const auto take = [&next](int64_t floats) { return (next += floats) - floats; };
        q = reinterpret_cast<vec*>(take(args.head_dim * TILE));
        o = reinterpret_cast<vec*>(take(args.head_dim_v * TILE));
        s = reinterpret_cast<vec*>(take(KEYS * TILE));
        k = args.dtype ? take(args.head_dim * KEYS) : nullptr;
        v = args.dtype ? take(args.head_dim_v * KEYS) : nullptr;
    }
};

// The keys that a query sees, as Problem.key_range has them; none where low >= high.
struct Range {
    int64_t low, high;
    Range(const flash_args& args, int64_t row) {
        const int64_t position = row + args.seqlen_k - args.seqlen_q;
        low = args.window ? std::max<int64_t>(0, position - args.window + 1) : 0;
        high = args.causal ? position + 1 : args.window ? position + args.window : args.seqlen_k;
        high = std::min(high, args.seqlen_k);
    }
};

struct Rows {
    const float* data;
    int64_t stride;
};

// Rows of fp32 as they lie; others converted into the scratch.
template <class T> inline Rows as_float(const T* rows, int64_t stride, int64_t count, int64_t dim, float* scratch) {
    if constexpr (std::is_same_v<T, float>) return {rows, stride};
    else {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; i < dim; ++i) scratch[row * dim + i] = widen(rows[row * stride + i]);
        return {scratch, dim};
    }
}

inline int64_t offset(const int64_t (&stride)[3], int64_t batch, int64_t head, int64_t row) {
    return batch * stride[0] + head * stride[1] + row * stride[2];
}

// -inf where the query in a lane does not see the key.
template <int VECS>
void apply_mask(const flash_args& args, int64_t first_row, int64_t key, int64_t keys, vec* s) {
    int32_t low[VECS * LANES], high[VECS * LANES];
    for (int lane = 0; lane < VECS * LANES; ++lane) {
        const Range seen(args, std::min(first_row + lane, args.seqlen_q - 1));
        low[lane] = static_cast<int32_t>(std::clamp<int64_t>(seen.low - key, 0, keys));
        high[lane] = static_cast<int32_t>(std::clamp<int64_t>(seen.high - key, 0, keys));
    }
    for (int32_t j = 0; j < keys; ++j)
        for (int lane = 0; lane < VECS * LANES; ++lane) {
            float& score = reinterpret_cast<float*>(s)[j * VECS * LANES + lane];
            score = low[lane] <= j && j < high[lane] ? score : -INF;
        }
}

// S becomes exp2((S - top) · scale) with the new top, and sum follows; alpha is what the sums so far are to be
// multiplied by. S · scale - top, one FMA, would save an operation, but leave top's rounding error in the exponent.
template <int VECS> inline void softmax(int64_t keys, float scale, vec* s, vec* top, vec* sum, vec* alpha) {
    vec highest[VECS], total[VECS] = {};
    std::copy_n(top, VECS, highest);
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < VECS; ++i) highest[i] = maximum(highest[i], s[j * VECS + i]);
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < VECS; ++i) total[i] += s[j * VECS + i] = exp2((s[j * VECS + i] - highest[i]) * scale);
    for (int i = 0; i < VECS; ++i) {
        alpha[i] = exp2((top[i] - highest[i]) * scale);
        top[i] = highest[i];
        sum[i] = sum[i] * alpha[i] + total[i];
    }
}

// One tile: `rows` queries of one head from first_row on.
template <class T, int VECS>
void attend(const flash_args& args, int64_t batch, int64_t head, int64_t first_row, int64_t rows,
            const Scratch& scratch) {
    constexpr int WIDTH = VECS * LANES;
    const int64_t panels = (rows + WIDTH - 1) / WIDTH, head_kv = head / (args.heads_q / args.heads_kv);
    const int64_t dim = args.head_dim, dim_v = args.head_dim_v;
    const float scale = static_cast<float>(args.softmax_scale * LOG2_E);
    const T* q = static_cast<const T*>(args.q) + offset(args.q_stride, batch, head, first_row);
    const T* k = static_cast<const T*>(args.k) + offset(args.k_stride, batch, head_kv, 0);
    const T* v = static_cast<const T*>(args.v) + offset(args.v_stride, batch, head_kv, 0);
    T* out = static_cast<T*>(args.out) + offset(args.out_stride, batch, head, first_row);

    vec top[TILE / LANES], sum[TILE / LANES] = {}, alpha[VECS];
    std::fill_n(top, TILE / LANES, broadcast(LOWEST));  // not -inf, so that a row without keys has no -inf - -inf
    std::fill_n(scratch.o, panels * dim_v * VECS, vec{});
    std::fill_n(scratch.q, panels * dim * VECS, vec{});
    for (int64_t row = 0; row < rows; ++row) {
        float* column = reinterpret_cast<float*>(scratch.q) + row / WIDTH * dim * WIDTH + row % WIDTH;
        for (int64_t i = 0; i < dim; ++i) column[i * WIDTH] = widen(q[row * args.q_stride[2] + i]);
    }

    // Both ends of a Range grow with the row.
    const Range first(args, first_row), last(args, first_row + rows - 1);
    for (int64_t key = first.low; key < last.high; key += KEYS) {
        const int64_t keys = std::min<int64_t>(KEYS, last.high - key);
        const Rows k_block = as_float(k + key * args.k_stride[2], args.k_stride[2], keys, dim, scratch.k);
        const Rows v_block = as_float(v + key * args.v_stride[2], args.v_stride[2], keys, dim_v, scratch.v);
        const bool straddles = key < last.low || first.high < key + keys;
        for (int64_t panel = 0; panel < panels; ++panel) {
            const vec* q_panel = scratch.q + panel * dim * VECS;
            vec* o_panel = scratch.o + panel * dim_v * VECS;
            multiply<VECS>(k_block.data, k_block.stride, 1, keys, dim, q_panel, scratch.s, nullptr);
            if (straddles) apply_mask<VECS>(args, first_row + panel * WIDTH, key, keys, scratch.s);
            softmax<VECS>(keys, scale, scratch.s, top + panel * VECS, sum + panel * VECS, alpha);
            multiply<VECS>(v_block.data, 1, v_block.stride, dim_v, keys, scratch.s, o_panel, alpha);
        }
    }

    for (int64_t row = 0; row < rows; ++row) {
        const float* column = reinterpret_cast<float*>(scratch.o) + row / WIDTH * dim_v * WIDTH + row % WIDTH;
        const float total = reinterpret_cast<float*>(sum)[row], inverse = 1.0f / total;
        for (int64_t i = 0; i < dim_v; ++i)
            out[row * args.out_stride[2] + i] = narrow<T>(total == 0.0f ? 0.0f : column[i * WIDTH] * inverse);
    }
}

int64_t tiles_per_head(const flash_args& args) { return (args.seqlen_q + TILE - 1) / TILE; }
int64_t tiles_in_all(const flash_args& args) { return tiles_per_head(args) * args.heads_q * args.batch; }
int64_t threads_used(const flash_args& args) {
    return std::min({int64_t{args.threads}, tiles_in_all(args), int64_t{MAX_THREADS}});
}

// What each thread does: draw tiles until none is left. A head's last tiles come first: under a causal mask they see
// the most keys, and a long tile drawn late is one that the other threads wait for.
template <class T> void work(const flash_args& args, std::atomic<int64_t>& next, char* memory) {
    const Scratch scratch(args, memory);
    const int64_t tiles = tiles_per_head(args), units = tiles_in_all(args);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
        const int64_t head = unit / tiles % args.heads_q, batch = unit / tiles / args.heads_q;
        const int64_t first_row = (tiles - 1 - unit % tiles) * TILE;
        const int64_t rows = std::min<int64_t>(TILE, args.seqlen_q - first_row);
        if (rows <= LANES) attend<T, 1>(args, batch, head, first_row, rows, scratch);
        else attend<T, MICRO_VECS>(args, batch, head, first_row, rows, scratch);
    }
}

int check(const flash_args& args) {
    const int64_t sizes[] = {args.batch,    args.heads_q,  args.heads_kv,  args.seqlen_q,
                             args.seqlen_k, args.head_dim, args.head_dim_v};
    if (*std::min_element(std::begin(sizes), std::end(sizes)) < 1 || args.window < 0) return FLASH_BAD_SHAPE;
    if (args.heads_q % args.heads_kv || std::max(args.head_dim, args.head_dim_v) > MAX_DIM) return FLASH_BAD_SHAPE;
    if (args.dtype < 0 || args.dtype > 2) return FLASH_BAD_DTYPE;
    if (args.threads < 1) return FLASH_BAD_THREADS;
    return FLASH_DONE;
}

}  // namespace

// The bytes that args->workspace must have, at any alignment; -1 where flash_attention would refuse the arguments.
// Of the pointers in args it reads none.
extern "C" int64_t flash_attention_workspace(const flash_args* args) {
    return check(*args) ? -1 : Scratch::bytes(*args) * threads_used(*args) + ALIGNMENT;
}

// 0 where it is done, else the flash_status that says which argument it refuses. Allocates nothing but its threads,
// and ends with them. Two calls at a time need two workspaces. The result does not depend on the number of threads.
extern "C" int flash_attention(const flash_args* args) {
    if (const int status = check(*args)) return status;
    if (!args->q || !args->k || !args->v || !args->out || !args->workspace) return FLASH_NULL_POINTER;
    const auto run = args->dtype == 0 ? work<float> : args->dtype == 1 ? work<half> : work<bfloat>;
    const auto address = reinterpret_cast<uintptr_t>(args->workspace);
    char* memory = static_cast<char*>(args->workspace) + (ALIGNMENT - address % ALIGNMENT);
    const int64_t bytes = Scratch::bytes(*args), helpers = threads_used(*args) - 1;

    std::atomic<int64_t> next{0};
    std::thread threads[MAX_THREADS];
    int64_t started = 0;
    try {
        for (; started < helpers; ++started)
            threads[started] = std::thread(run, std::cref(*args), std::ref(next), memory + bytes * (started + 1));
    } catch (const std::exception&) {
        // The system has no thread left to give: those that started and this one draw all the tiles.
    }
    run(*args, next, memory);
    for (int64_t i = 0; i < started; ++i) threads[i].join();
    return FLASH_DONE;
}
