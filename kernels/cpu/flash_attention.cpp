// Flash attention, forward, on a CPU: out = softmax(softmax_scale · Q Kᵀ + mask) V.
//
// A tile of queries meets a range of keys; that is the unit of work which threads draw from a counter:
//
//     Qt[d][lane] = transpose(Q);  O[e][lane] = sum[lane] = 0;  top[lane] = lowest;  scale = softmax_scale · log2(e)
//     for each block of keys that some query of the tile sees
//         Kp = pack_keys(K);  Vp = pack_columns(V)             into the order in which they are read, as fp32 (gemm.h)
//         for each panel of queries, MICRO_VECS vectors wide
//             S[key][lane] = Kp · Qt                           multiply()
//             S            = -inf where masked                 only in blocks that straddle an edge
//             top'         = max(top, S);  alpha = exp2((top - top') · scale)
//             S            = exp2((S - top') · scale);  sum = sum · alpha + Σ S
//             O[e][lane]   = O · alpha + Vpᵀ · S               multiply()
//     out = transpose(O / sum)
//
// Queries lie in vector lanes, so the softmax needs no horizontal operation, a mask is a compare, and S is written as
// the next product reads it. Products in vector registers sum some steps from zero and then add the sum to O · alpha: the
// rescale costs no pass of its own, and errors do not grow with the number of keys as those of one long sum do. Q is not
// scaled beforehand: at logits up to ±100, rounding its elements again made the worst error 1.4 times larger.
//
// What a query does not see still meets a weight of zero where another query of its panel sees it: values must be finite
// there. O is divided by the sum at the end, so the sum of all values must be finite too (with AMX, of 2⁸ times it).
//
// Where there are fewer tiles than would keep all threads busy, a tile's keys are split among several units, and the
// last of them to end combines their O, sum and top. Queries of heads that share their keys are put into one tile where
// they are few. Up to FEW_ROWS queries (decoding) do without packing: attend_few() reads K and V where they lie.
//
// bf16 is computed in fp32, and by AVX512-BF16 in pairs, where P is rounded to bf16; fp16 always in fp32.
//
// By hand: g++ -O3 -std=c++17 -fPIC -shared -pthread -Wall -Wextra -march=native flash_attention.cpp -o flash.so
// (g++ ≥ 11, clang ≥ 15; x86-64 and Arm). -ffast-math breaks it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <iterator>

#include "gemm.h"
#include "pool.h"
#if defined(FLASH_AMX)
#include "amx.h"
#endif

// Strides count elements; the last dimension has stride 1. Mirrored by FlashArgs in plugins/jit_flash/cpu.py.
struct flash_args {
    const void *q, *k, *v;
    void *out, *workspace;
    float* lse;  // null, or [batch][heads_q][seqlen_q]: log Σ exp(softmax_scale · q · k), -inf where no key is seen
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, sequence
    int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    int64_t window;  // a query sees keys less than this away from its own position; 0: all
    double softmax_scale;
    int32_t dtype;    // 0 fp32, 1 fp16, 2 bf16: of q, k, v and out
    int32_t causal;   // not 0: no key after the query's own position, seqlen_q and seqlen_k aligned at their ends
    int32_t threads;  // at most
};

enum flash_status : int {
    FLASH_DONE, FLASH_BAD_SHAPE, FLASH_BAD_DTYPE, FLASH_BAD_THREADS, FLASH_BAD_SCALE, FLASH_NULL_POINTER, FLASH_NO_TILES
};

namespace {

// Queries of a tile: each packs all of its keys, which costs about 1/50 of the products at 128 and d = 128.
constexpr int64_t TILE = 256;
constexpr int64_t FEW_ROWS = 8;
constexpr bool ONE_VECTOR = LANES > FEW_ROWS;  // whether panels of one vector are worth their code
// Keys of their blocks: KEYS_PER_ROW for each row, in whole groups, as long as K and V of a block leave half of an L1 of
// 32 KiB to what is fetched ahead. docs/kernels/jit_flash.md has what other sizes gave.
constexpr int64_t KEYS_PER_ROW = 8;
constexpr int64_t FEW_KEYS = 32;
constexpr int64_t FEW_BYTES = 16 << 10;
constexpr int64_t KEY_GROUP = std::max<int64_t>(8, LANES);  // whose products with a row are summed together
static_assert(FEW_KEYS % KEY_GROUP == 0 && KEY_GROUP % LANES == 0);
// Keys whose values are added up before they are added to others, where rows are few: their sums are short otherwise.
constexpr int64_t FEW_ROWS_KEYS = 16384;
constexpr int64_t MAX_DIM = 256;
constexpr int64_t PANEL = MICRO_VECS * LANES;  // queries that are computed together
// A unit is worth drawing from this many keys on, and a thread worth waking from this many multiply-adds on (10 µs).
constexpr int64_t SPLIT_KEYS = 256;
constexpr int64_t THREAD_WORK = 1 << 19;
constexpr int64_t LINE = 32;  // floats: two cache lines, for they are fetched in pairs

constexpr double LOG2_E = 1.4426950408889634;

#if defined(FLASH_AMX)
template <class T> using Products = std::conditional_t<std::is_same_v<T, bfloat>, AmxProducts, VectorProducts<T>>;
constexpr int64_t DIM_GRAIN = AmxProducts::PANEL;
#else
template <class T> using Products = VectorProducts<T>;
constexpr int64_t DIM_GRAIN = LANES;
#endif

int64_t whole_lines(int64_t floats) { return round_up(floats, LINE); }

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

// What a thread's scratch has to hold, in floats; the most that a dtype takes.
struct Room {
    int64_t s = 0, k = 0, v = 0;
    template <class T> void have(const flash_args& args) {
        s = std::max(s, Products<T>::KEYS * PANEL);
        k = std::max(k, Products<T>::k_floats(args.head_dim));
        v = std::max(v, Products<T>::v_floats(args.head_dim_v));
    }
    explicit Room(const flash_args& args) {
        if (args.dtype == 0) have<float>(args);
        else if (args.dtype == 1) have<half>(args);
        else have<bfloat>(args);
    }
};

// How the problem is cut, and where in the workspace everything lies: parts of split tiles, then scratch.
struct Plan {
    int64_t heads_per_tile, tiles_per_group, tiles, splits, threads;
    int64_t rows, dim, dim_v;  // of a tile at most; padded to whole vectors or tiles
    int64_t part, parts, scratch;  // in floats
    Room room;

    explicit Plan(const flash_args& args) : room(args) {
        const int64_t group = args.heads_q / args.heads_kv;
        heads_per_tile = std::max<int64_t>(1, std::min(group, TILE / args.seqlen_q));
        tiles_per_group = ceil_div(group, heads_per_tile) * ceil_div(args.seqlen_q, TILE);
        tiles = args.batch * args.heads_kv * tiles_per_group;
        const int64_t tile_rows = heads_per_tile * std::min(args.seqlen_q, TILE);
        // What a tile sees; a window hides the rest from all of it.
        const int64_t window = args.window ? (args.causal ? 1 : 2) * args.window + std::min(args.seqlen_q, TILE) : 0;
        const int64_t keys = args.window ? std::min(args.seqlen_k, window) : args.seqlen_k;
        // Few rows cost as much as some more would: their keys are read all the same.
        const double work = double(tiles) * double(std::max<int64_t>(tile_rows, 16)) * double(keys) *
                            double(args.head_dim + args.head_dim_v);
        const double worth = std::max(1.0, std::min(work / double(THREAD_WORK), double(1 + Pool::MAX_HELPERS)));
        threads = std::min<int64_t>(args.threads, static_cast<int64_t>(worth));
        // A unit for each thread. Two, of twice as many keys, even out some of what threads differ in speed; more would
        // not pay for the queries that each transposes and the part that it leaves to be added up: with four a thread it
        // took 2 to 4 % longer, with half as many keys in each 5 % (Zen 3, two threads).
        const auto splits_for = [&](int64_t units, int64_t fewest_keys) {
            return std::min(ceil_div(units, tiles), keys / fewest_keys);
        };
        splits = threads == 1 ? 1 : std::max(splits_for(threads, SPLIT_KEYS), splits_for(2 * threads, 2 * SPLIT_KEYS));
        splits = std::max<int64_t>(1, std::min(splits, std::max<int64_t>(8, threads)));
        if (tile_rows <= FEW_ROWS) splits = std::max(splits, ceil_div(keys, FEW_ROWS_KEYS));
        threads = std::min(threads, tiles * splits);

        rows = round_up(tile_rows, PANEL);
        dim = round_up(args.head_dim, DIM_GRAIN);
        dim_v = round_up(args.head_dim_v, DIM_GRAIN);
        part = whole_lines(rows * (dim_v + 2));
        parts = splits == 1 ? 0 : tiles * splits;
        scratch = whole_lines(dim * rows) + whole_lines(room.s) + whole_lines(room.k) + whole_lines(room.v) +
                  (splits == 1 ? part : 0);
    }
    int64_t floats() const { return parts * part + threads * scratch; }
};

// Sums over a range of keys: O unnormalised, and of each row the highest score and the sum of exp2((s - top) · scale).
// O is [panel][e][lane], or [row][e] where the rows are few.
struct Part {
    float *o, *top, *sum;
    Part(const Plan& plan, float* memory) : o(memory), top(o + plan.rows * plan.dim_v), sum(top + plan.rows) {}
};

// One thread's own memory.
struct Scratch {
    float *q, *s, *k, *v;
    float* part;  // where no tile is split
    Scratch(const Plan& plan, float* next) {
        const auto take = [&next](int64_t floats) { return (next += whole_lines(floats)) - whole_lines(floats); };
        q = take(plan.dim * plan.rows);
        s = take(plan.room.s);
        k = take(plan.room.k);
        v = take(plan.room.v);
        part = next;
    }
};

// Queries that see the same K and V: rows first_row, first_row + 1, … of `heads` heads from `head` on.
struct Tile {
    int64_t batch, head, first_row, heads, rows_per_head, rows;
    Range first, last;  // both ends of a Range grow with the row

    Tile(const flash_args& args, int64_t batch, int64_t head, int64_t heads, int64_t first_row, int64_t rows_per_head)
        : batch(batch), head(head), first_row(first_row), heads(heads), rows_per_head(rows_per_head),
          rows(heads * rows_per_head), first(args, first_row), last(args, first_row + rows_per_head - 1) {}

    int64_t row(int64_t index) const { return first_row + index % rows_per_head; }
    int64_t offset(const int64_t (&stride)[3], int64_t index) const {
        return batch * stride[0] + (head + index / rows_per_head) * stride[1] + row(index) * stride[2];
    }
    int64_t offset_kv(const flash_args& args, const int64_t (&stride)[3]) const {
        return batch * stride[0] + head / (args.heads_q / args.heads_kv) * stride[1];
    }
};

// Which keys of a block some of a tile's rows see, and whether some of them see fewer.
struct Seen {
    int64_t from, to;
    bool masked;
    Seen(const flash_args& args, const Tile& tile, int64_t row, int64_t end, int64_t key, int64_t keys) : from(0), to(keys) {
        masked = key < tile.last.low || tile.first.high < key + keys;
        if (!masked || tile.heads > 1) return;  // rows of several heads lie in no order
        from = std::max<int64_t>(0, Range(args, tile.row(row)).low - key);
        to = std::min(keys, Range(args, tile.row(end - 1)).high - key);
        masked = from < Range(args, tile.row(end - 1)).low - key || Range(args, tile.row(row)).high - key < to;
    }
};

// A head's last tiles come first: under a causal mask they see the most keys, and a long one drawn late is waited for.
Tile tile_at(const flash_args& args, const Plan& plan, int64_t index) {
    const int64_t group = args.heads_q / args.heads_kv, row_tiles = ceil_div(args.seqlen_q, TILE);
    const int64_t heads_kv = index / plan.tiles_per_group, within = index % plan.tiles_per_group;
    const int64_t head = within / row_tiles * plan.heads_per_tile;
    const int64_t first_row = (row_tiles - 1 - within % row_tiles) * TILE;
    return Tile(args, heads_kv / args.heads_kv, heads_kv % args.heads_kv * group + head,
                std::min(plan.heads_per_tile, group - head), first_row, std::min(TILE, args.seqlen_q - first_row));
}

// ---- a tile of many rows --------------------------------------------------------------------------------------------

// -inf where the query in a lane does not see the key.
template <int VECS>
void apply_mask(const flash_args& args, const Tile& tile, int64_t first, int64_t key, int64_t from, int64_t to, vec* s) {
    int32_t low[VECS * LANES], high[VECS * LANES];
    for (int lane = 0; lane < VECS * LANES; ++lane) {
        const Range seen(args, tile.row(std::min(first + lane, tile.rows - 1)));
        low[lane] = static_cast<int32_t>(std::clamp<int64_t>(seen.low - key, 0, to));
        high[lane] = static_cast<int32_t>(std::clamp<int64_t>(seen.high - key, 0, to));
    }
    for (int32_t j = static_cast<int32_t>(from); j < to; ++j)
        for (int lane = 0; lane < VECS * LANES; ++lane) {
            float& score = reinterpret_cast<float*>(s)[j * VECS * LANES + lane];
            score = low[lane] <= j && j < high[lane] ? score : -INF;
        }
}

// S becomes exp2((S - top) · scale) with the new top, and sum follows; alpha is what the sums so far are to be
// multiplied by. Where that multiplication is not free, top stays until a weight would be above 2⁸.
// S · scale - top · scale would be one operation less with FMA; without FMA it is less accurate.
template <class T, int VECS>
void softmax(int64_t from, int64_t to, float scale, vec* s, vec* top, vec* sum, vec* alpha) {
    vec highest[VECS], total[VECS] = {};
    std::copy_n(top, VECS, highest);
    for (int64_t j = from; j < to; ++j) {
        UNROLL
        for (int i = 0; i < VECS; ++i) highest[i] = maximum(highest[i], s[j * VECS + i]);
    }
    if constexpr (!Products<T>::RESCALES_FREE)
        for (int i = 0; i < VECS; ++i) highest[i] = (highest[i] - top[i]) * scale > 8.0f ? highest[i] : top[i];
    for (int64_t j = from; j < to; ++j) {
        UNROLL
        for (int i = 0; i < VECS; ++i)
            total[i] += s[j * VECS + i] = exp2<IN_PAIRS<T>>((s[j * VECS + i] - highest[i]) * scale);
    }
    for (int i = 0; i < VECS; ++i) {
        alpha[i] = exp2((top[i] - highest[i]) * scale);
        top[i] = highest[i];
        sum[i] = sum[i] * alpha[i] + total[i];
    }
}

// Where steps are pairs, rows j and j + 1 of S become row j / 2 of pairs, rounded to bf16, up to the end of the last
// grain, with zeros for rows from `to` on.
template <class T, int VECS> void pair_rows(int64_t from, int64_t to, vec* s) {
    if constexpr (!IN_PAIRS<T>) return;
#if defined(__AVX512BF16__)
    static const struct Interleave {
        uint16_t index[32];
        Interleave() {
            for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i & 1) * 16);
        }
    } interleave;
    const __m512i index = _mm512_loadu_si512(interleave.index);
    for (int64_t j = from; j < to; j += 2) {
        UNROLL
        for (int i = 0; i < VECS; ++i) {
            const vec low = s[j * VECS + i], high = j + 1 < to ? s[(j + 1) * VECS + i] : vec{};
            const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
            s[j / 2 * VECS + i] = reinterpret_cast<vec>(_mm512_permutexvar_epi16(index, reinterpret_cast<__m512i>(both)));
        }
    }
    std::fill(s + steps<T>(to) * VECS, s + round_up(to, Products<T>::GRAIN) / 2 * VECS, vec{});
#else
    (void)from, (void)to, (void)s;
#endif
}

// Sums of a tile over the keys from low to high.
template <class T, int VECS>
void attend(const flash_args& args, const Plan& plan, const Tile& tile, int64_t low, int64_t high,
            const Scratch& scratch, const Part& part) {
    using Products = ::Products<T>;
    constexpr int64_t WIDTH = VECS * LANES, KEYS = Products::KEYS, GRAIN = Products::GRAIN;
    const int64_t dim = args.head_dim, dim_v = args.head_dim_v, dim_steps = Products::dim_steps(dim);
    const int64_t panels = ceil_div(tile.rows, WIDTH);
    const float scale = static_cast<float>(args.softmax_scale * LOG2_E);
    const T* q = static_cast<const T*>(args.q);
    const T* k = static_cast<const T*>(args.k) + tile.offset_kv(args, args.k_stride);
    const T* v = static_cast<const T*>(args.v) + tile.offset_kv(args, args.v_stride);
    vec* s = reinterpret_cast<vec*>(scratch.s);

    for (int64_t first = 0; first < tile.rows; first += WIDTH) {
        const auto row_at = [&](int64_t i) { return q + tile.offset(args.q_stride, first + i); };
        pack_rows<T>(row_at, std::min(WIDTH, tile.rows - first), dim, dim_steps, scratch.q + first * dim_steps, WIDTH);
        std::fill_n(part.o + first * plan.dim_v, WIDTH * plan.dim_v, 0.0f);
        std::fill_n(part.top + first, WIDTH, LOWEST);  // not -inf: a row without keys would have -inf - -inf
        std::fill_n(part.sum + first, WIDTH, 0.0f);
    }

    const int64_t blocks = std::max<int64_t>(1, ceil_div(high - low, KEYS));
    const int64_t keys_per_block = round_up(ceil_div(high - low, blocks), GRAIN);
    for (int64_t key = low; key < high; key += keys_per_block) {
        const int64_t keys = std::min(keys_per_block, high - key), next = key + keys;
        const int64_t after = std::min(keys_per_block, high - next);
        Products::pack_keys(k + key * args.k_stride[2], args.k_stride[2], keys, dim, scratch.k);
        Products::pack_columns(v + key * args.v_stride[2], args.v_stride[2], keys, dim_v, scratch.v);
        Ahead k_ahead(k + next * args.k_stride[2], args.k_stride[2], after, dim, panels * Products::panels(keys));
        Ahead v_ahead(v + next * args.v_stride[2], args.v_stride[2], after, dim_v, panels * Products::panels(dim_v));
        for (int64_t first = 0; first < tile.rows; first += WIDTH) {
            const Seen seen(args, tile, first, std::min(first + WIDTH, tile.rows), key, keys);
            if (seen.from >= seen.to) continue;
            const int64_t from = seen.from / GRAIN * GRAIN, to = seen.to;
            const vec* q_panel = reinterpret_cast<const vec*>(scratch.q + first * dim_steps);
            vec *o = reinterpret_cast<vec*>(part.o + first * plan.dim_v), alpha[VECS];
            Products::template scores<VECS>(scratch.k, keys, dim, from, to, q_panel, s, k_ahead);
            if (seen.masked || from < seen.from) apply_mask<VECS>(args, tile, first, key, from, to, s);
            softmax<T, VECS>(from, to, scale, s, reinterpret_cast<vec*>(part.top + first),
                             reinterpret_cast<vec*>(part.sum + first), alpha);
            pair_rows<T, VECS>(from, to, s);
            Products::template add_values<VECS>(scratch.v, keys, dim_v, from, to, s, o, alpha, v_ahead);
        }
    }
}

// ---- a tile of few rows ---------------------------------------------------------------------------------------------

// Lanes lie along the head dimension here, and K and V are read where they are, from memory once.

// s[key] = q · k for ROWS rows, whose vectors lie side by side, and `keys` keys; what is left of the last group belongs to
// no key. AT_ONCE × ROWS = 8 sums are kept in registers.
template <class T, int ROWS>
void dot_keys(const T* k, int64_t stride, int64_t keys, int64_t dim, const float* q, float* s, Ahead& ahead) {
    constexpr int AT_ONCE = 8 / ROWS;
    constexpr int64_t LINE = elements_of_line<T>(), STEP = std::max<int64_t>(LANES, LINE);
    for (int64_t first = 0; first < keys; first += KEY_GROUP) {
        vec sums[ROWS][KEY_GROUP];
        for (int64_t at = 0; at < KEY_GROUP; at += AT_ONCE) {
            vec sum[AT_ONCE][ROWS] = {};
            const T* row[AT_ONCE];
            for (int j = 0; j < AT_ONCE; ++j) row[j] = k + std::min(first + at + j, keys - 1) * stride;
            const auto add = [&](int64_t i, int64_t count) {
                vec x[AT_ONCE];
                UNROLL
                for (int j = 0; j < AT_ONCE; ++j) x[j] = load_part(row[j] + i, count);
                UNROLL
                for (int r = 0; r < ROWS; ++r) {  // K may be loaded for each row: that is fewer instructions between lines
                    const vec y = in_register(load(q + i * ROWS + r * LANES));
                    UNROLL
                    for (int j = 0; j < AT_ONCE; ++j) sum[j][r] += x[j] * y;
                }
            };
            int64_t i = 0;
            for (; i + STEP <= dim; i += STEP) {
                ahead.fetch(AT_ONCE * STEP / LINE);
                UNROLL
                for (int64_t vector = 0; vector < STEP; vector += LANES) add(i + vector, LANES);
            }
            for (; i < dim; i += LANES) add(i, dim - i);
            for (int j = 0; j < AT_ONCE; ++j)
                for (int r = 0; r < ROWS; ++r) sums[r][at + j] = sum[j][r];
        }
        for (int r = 0; r < ROWS; ++r)
            for (int64_t at = 0; at < KEY_GROUP; at += LANES)
                store(s + r * FEW_KEYS + first + at, sums_of_lanes(sums[r] + at));
    }
}

// O = O · alpha + Σ p[key] · v for ROWS rows. COLUMNS × ROWS = 8 sums are kept in registers over all keys of the block.
template <class T, int ROWS, int COLUMNS = 8 / ROWS>
void add_values(const T* v, int64_t stride, int64_t keys, int64_t dim, const float* p, const float* alpha, float* o,
                int64_t o_pitch, Ahead& ahead) {
    constexpr int64_t LINE = elements_of_line<T>(), TOGETHER = std::max<int64_t>(1, LINE / (COLUMNS * LANES));
    constexpr int64_t LINES = TOGETHER * COLUMNS * LANES / LINE;
    for (int64_t i = 0; i < dim; i += COLUMNS * LANES) {
        if constexpr (COLUMNS > 1)
            if (dim - i < COLUMNS * LANES)
                return add_values<T, ROWS, COLUMNS / 2>(v + i, stride, keys, dim - i, p, alpha, o + i, o_pitch, ahead);
        vec sum[ROWS][COLUMNS] = {};
        const T* row = v + i;
        const auto add = [&](int64_t key) {
            UNROLL
            for (int column = 0; column < COLUMNS; ++column) {
                const vec x = load_part(row + column * LANES, COLUMNS > 1 ? LANES : dim - i);
                UNROLL
                for (int r = 0; r < ROWS; ++r) sum[r][column] += p[r * FEW_KEYS + key] * x;
            }
            row += stride;
        };
        int64_t key = 0;
        for (; key + TOGETHER <= keys; key += TOGETHER) {
            ahead.fetch(LINES);
            UNROLL
            for (int j = 0; j < TOGETHER; ++j) add(key + j);
        }
        for (; key < keys; ++key) add(key);
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            UNROLL
            for (int column = 0; column < COLUMNS; ++column) {
                float* to = o + r * o_pitch + i + column * LANES;
                store(to, load(to) * alpha[r] + sum[r][column]);
            }
        }
    }
}

// As softmax(), for ROWS rows of `keys` scores, whole vectors of them.
template <int ROWS> void softmax_few(int64_t keys, float scale, float* s, float* top, float* sum, float* alpha) {
    vec highest[ROWS], total[ROWS] = {}, down = {};
    UNROLL
    for (int r = 0; r < ROWS; ++r) highest[r] = broadcast(top[r]);
    for (int64_t i = 0; i < keys; i += LANES) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) highest[r] = maximum(highest[r], load(s + r * FEW_KEYS + i));
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        const float most = maximum_of_lanes(highest[r]);
        highest[r] = broadcast(most);
        if constexpr (ROWS == 1) down = broadcast(top[r] - most);
        else down[r] = top[r] - most;
        top[r] = most;
    }
    for (int64_t i = 0; i < keys; i += LANES) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const vec p = exp2((load(s + r * FEW_KEYS + i) - highest[r]) * scale);
            store(s + r * FEW_KEYS + i, p);
            total[r] += p;
        }
    }
    const vec factor = exp2(down * scale);
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        alpha[r] = factor[r];
        sum[r] = sum[r] * factor[r] + sum_of_lanes(total[r]);
    }
}

// f(first row, number of rows known to the compiler), for rows by fours, twos and ones.
template <class F> void for_rows(int64_t rows, const F& f) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) f(row, std::integral_constant<int, 4>{});
    for (; row + 2 <= rows; row += 2) f(row, std::integral_constant<int, 2>{});
    for (; row < rows; ++row) f(row, std::integral_constant<int, 1>{});
}

template <class T>
void attend_few(const flash_args& args, const Plan& plan, const Tile& tile, int64_t low, int64_t high,
                const Scratch& scratch, const Part& part) {
    const float scale = static_cast<float>(args.softmax_scale * LOG2_E);
    const T* k = static_cast<const T*>(args.k) + tile.offset_kv(args, args.k_stride);
    const T* v = static_cast<const T*>(args.v) + tile.offset_kv(args, args.v_stride);
    float *s = scratch.s, alpha[FEW_ROWS];
    for_rows(tile.rows, [&](int64_t first, auto count) {  // as dot_keys() reads them
        for (int64_t row = 0; row < count; ++row) {
            const T* q = static_cast<const T*>(args.q) + tile.offset(args.q_stride, first + row);
            for (int64_t i = 0; i < args.head_dim; i += LANES)
                store(scratch.q + first * plan.dim + i * count + row * LANES, load_part(q + i, args.head_dim - i));
        }
    });
    std::fill_n(part.o, tile.rows * plan.dim_v, 0.0f);
    std::fill_n(part.top, tile.rows, LOWEST);
    std::fill_n(part.sum, tile.rows, 0.0f);
    static_assert(FEW_ROWS * FEW_KEYS <= Products<T>::KEYS * PANEL, "s has room");
    const int64_t fitting = FEW_BYTES / ((args.head_dim + args.head_dim_v) * int64_t{sizeof(T)}) / KEY_GROUP * KEY_GROUP;
    const int64_t most = std::clamp(fitting, KEY_GROUP, FEW_KEYS);
    const int64_t block = std::min(most, round_up(KEYS_PER_ROW * tile.rows, KEY_GROUP));
    for (int64_t key = low; key < high; key += block) {
        const int64_t keys = std::min(block, high - key), after = std::min(block, high - key - keys);
        const T *k_block = k + key * args.k_stride[2], *v_block = v + key * args.v_stride[2];
        Ahead v_ahead(v_block, args.v_stride[2], keys, args.head_dim_v);  // while there are the products with K
        Ahead k_ahead(k_block + keys * args.k_stride[2], args.k_stride[2], after, args.head_dim);
        for_rows(tile.rows, [&](int64_t row, auto count) {
            dot_keys<T, count>(k_block, args.k_stride[2], keys, args.head_dim, scratch.q + row * plan.dim,
                               s + row * FEW_KEYS, v_ahead);
        });
        if (keys < block || key < tile.last.low || tile.first.high < key + keys) {
            for (int64_t row = 0; row < tile.rows; ++row) {
                const Range seen(args, tile.row(row));
                float* scores = s + row * FEW_KEYS;
                std::fill(scores, scores + std::clamp<int64_t>(seen.low - key, 0, keys), -INF);
                std::fill(scores + std::clamp<int64_t>(seen.high - key, 0, keys), scores + block, -INF);
            }
        }
        for_rows(tile.rows, [&](int64_t row, auto count) {
            softmax_few<count>(block, scale, s + row * FEW_KEYS, part.top + row, part.sum + row, alpha + row);
        });
        for_rows(tile.rows, [&](int64_t row, auto count) {
            add_values<T, count>(v_block, args.v_stride[2], keys, args.head_dim_v, s + row * FEW_KEYS, alpha + row,
                                 part.o + row * plan.dim_v, plan.dim_v, k_ahead);
        });
    }
}

// ---- results --------------------------------------------------------------------------------------------------------

// Width of the panels in which a tile's O lies; 1 where its rows lie one after the other.
int64_t panel_width(const Tile& tile) {
    return tile.rows <= FEW_ROWS ? 1 : ONE_VECTOR && tile.rows <= LANES ? LANES : PANEL;
}

// In part 0 of a tile the rows of one panel become the sums over all of its parts, at the highest top of each row.
void combine(const flash_args& args, const Plan& plan, int64_t width, float* parts, int64_t first) {
    const float scale = static_cast<float>(args.softmax_scale * LOG2_E);
    const Part all(plan, parts);
    float weight[2][PANEL];
    for (int64_t split = 1; split < plan.splits; ++split) {
        const Part part(plan, parts + split * plan.part);
        for (int64_t i = 0; i < width; ++i) {
            const int64_t row = first + i;
            const float top = std::max(all.top[row], part.top[row]);
            weight[0][i] = exp2(broadcast((all.top[row] - top) * scale))[0];
            weight[1][i] = exp2(broadcast((part.top[row] - top) * scale))[0];
            all.top[row] = top;
            all.sum[row] = all.sum[row] * weight[0][i] + part.sum[row] * weight[1][i];
        }
        float* to = all.o + first * plan.dim_v;
        const float* from = part.o + first * plan.dim_v;
        const auto add = [&](int64_t at, vec own, vec other) { store(to + at, load(to + at) * own + load(from + at) * other); };
        if (width == 1) {
            for (int64_t at = 0; at < plan.dim_v; at += LANES) add(at, broadcast(weight[0][0]), broadcast(weight[1][0]));
        } else {
            for (int64_t at = 0; at < width * plan.dim_v; at += width)
                for (int64_t lane = 0; lane < width; lane += LANES)
                    add(at + lane, load(weight[0] + lane), load(weight[1] + lane));
        }
    }
}

// out = O / sum for rows from `first` to `end`, and the log-sum-exp where it is asked for; zeros and -inf for a query that
// sees no key.
template <class T>
void write(const flash_args& args, const Plan& plan, const Tile& tile, const Part& part, int64_t first, int64_t end) {
    const int64_t width = panel_width(tile), dim_v = args.head_dim_v;
    for (; first < end; first += LANES) {
        const int64_t rows = std::min<int64_t>(LANES, end - first);
        float inverse[LANES];
        T* out[LANES];
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = first + i;
            const Range seen(args, tile.row(row));
            const bool blind = seen.low >= seen.high;
            inverse[i] = blind ? 0.0f : 1.0f / part.sum[row];
            out[i] = static_cast<T*>(args.out) + tile.offset(args.out_stride, row);
            if (args.lse)
                args.lse[(tile.batch * args.heads_q + tile.head) * args.seqlen_q + tile.first_row + row] =
                    blind ? -INF : static_cast<float>(part.top[row] * args.softmax_scale + std::log(double(part.sum[row])));
        }
        for (int64_t at = 0; at < dim_v; at += LANES) {
            vec x[LANES];
            if (width == 1) {
                for (int64_t i = 0; i < rows; ++i) x[i] = load(part.o + (first + i) * plan.dim_v + at);
            } else {
                const float* panel = part.o + first / width * width * plan.dim_v + first % width;
                const int64_t columns = std::min<int64_t>(LANES, dim_v - at);
                for (int64_t i = 0; i < LANES; ++i) x[i] = i < columns ? load(panel + (at + i) * width) : vec{};
                transpose(x);
            }
            for (int64_t i = 0; i < rows; ++i)  // not 0 · O: a hidden value may be infinite
                store_part(out[i] + at, inverse[i] == 0.0f ? vec{} : x[i] * inverse[i], dim_v - at);
        }
    }
}

// Threads draw numbers below `count` until none is left.
template <class F> void draw(std::atomic<int64_t>& next, int64_t count, const F& f) {
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(index);
}

// What each thread does first: units of a tile and a range of its keys. Where tiles are not split, they end here.
template <class T> void work(const flash_args& args, const Plan& plan, std::atomic<int64_t>& next, float* parts, int thread) {
#if defined(FLASH_AMX)
    const std::conditional_t<std::is_same_v<T, bfloat>, AmxTiles, int> tiles{};
    (void)tiles;
#endif
    const Scratch scratch(plan, parts + plan.parts * plan.part + thread * plan.scratch);
    draw(next, plan.tiles * plan.splits, [&](int64_t unit) {
        const int64_t split = unit % plan.splits;
        const Tile tile = tile_at(args, plan, unit / plan.splits);
        const int64_t keys = std::max<int64_t>(0, tile.last.high - tile.first.low);
        const int64_t chunk = round_up(ceil_div(keys, plan.splits), Products<T>::GRAIN);
        const int64_t low = tile.first.low + std::min(keys, split * chunk);
        const int64_t high = tile.first.low + std::min(keys, (split + 1) * chunk);
        const Part part(plan, plan.splits == 1 ? scratch.part : parts + unit * plan.part);
        constexpr int FEWEST_VECS = ONE_VECTOR ? 1 : MICRO_VECS;
        if (tile.rows <= FEW_ROWS) attend_few<T>(args, plan, tile, low, high, scratch, part);
        else if (tile.rows <= FEWEST_VECS * LANES) attend<T, FEWEST_VECS>(args, plan, tile, low, high, scratch, part);
        else attend<T, MICRO_VECS>(args, plan, tile, low, high, scratch, part);
        if (plan.splits == 1) write<T>(args, plan, tile, part, 0, tile.rows);
    });
}

// And then, where tiles are split: panels of a tile, whose parts are added up.
template <class T> void finish(const flash_args& args, const Plan& plan, std::atomic<int64_t>& next, float* parts) {
    const int64_t panels = plan.rows / PANEL;
    draw(next, plan.tiles * panels, [&](int64_t unit) {
        const int64_t index = unit / panels, first = unit % panels * PANEL;
        const Tile tile = tile_at(args, plan, index);
        const int64_t end = std::min(tile.rows, first + PANEL), width = panel_width(tile);
        float* tile_parts = parts + index * plan.splits * plan.part;
        for (int64_t row = first; row < end; row += width) combine(args, plan, width, tile_parts, row);
        write<T>(args, plan, tile, Part(plan, tile_parts), first, end);
    });
}

int check(const flash_args& args) {
    const int64_t sizes[] = {args.batch,    args.heads_q,  args.heads_kv,  args.seqlen_q,
                             args.seqlen_k, args.head_dim, args.head_dim_v};
    if (*std::min_element(std::begin(sizes), std::end(sizes)) < 1 || args.window < 0) return FLASH_BAD_SHAPE;
    double product = 1.0;  // nothing that is computed from them may overflow
    for (const int64_t size : sizes) product *= double(size);
    if (product > 0x1p62 || args.window > INT64_MAX / 4) return FLASH_BAD_SHAPE;
    if (!std::isnormal(static_cast<float>(args.softmax_scale * LOG2_E)) || args.softmax_scale < 0) return FLASH_BAD_SCALE;
    if (args.heads_q % args.heads_kv || std::max(args.head_dim, args.head_dim_v) > MAX_DIM) return FLASH_BAD_SHAPE;
    if (args.dtype < 0 || args.dtype > 2) return FLASH_BAD_DTYPE;
    if (args.threads < 1) return FLASH_BAD_THREADS;
    return FLASH_DONE;
}

template <class T> void run(const flash_args& args, const Plan& plan, float* memory) {
    std::atomic<int64_t> next{0};
    const auto on_threads = [&](const auto& part_of) {
        if (plan.threads == 1) return part_of(0);
        pool.run(static_cast<int>(plan.threads) - 1, part_of);
    };
    on_threads([&](int thread) { work<T>(args, plan, next, memory, thread); });
    if (plan.splits == 1) return;
    next = 0;
    on_threads([&](int) { finish<T>(args, plan, next, memory); });
}

}  // namespace

// The instruction sets that this was compiled for.
extern "C" const char* flash_attention_isa() { return ISA; }

// The bytes that args->workspace must have, at any alignment; -1 where flash_attention would refuse the arguments.
// Of the pointers in args it reads none.
extern "C" int64_t flash_attention_workspace(const flash_args* args) {
    return check(*args) ? -1 : (Plan(*args).floats() + LINE) * int64_t{sizeof(float)};
}

// The threads that will share the work at most; 0 where flash_attention would refuse the arguments.
extern "C" int32_t flash_attention_threads(const flash_args* args) {
    return check(*args) ? 0 : static_cast<int32_t>(Plan(*args).threads);
}

// 0 where it is done, else the flash_status that says which argument it refuses. Two calls at a time need two
// workspaces. With the same number of threads the result is the same, bit by bit.
extern "C" int flash_attention(const flash_args* args) {
    if (const int status = check(*args)) return status;
    if (!args->q || !args->k || !args->v || !args->out || !args->workspace) return FLASH_NULL_POINTER;
    const auto address = reinterpret_cast<uintptr_t>(args->workspace);
    constexpr uintptr_t ALIGNMENT = LINE * sizeof(float);
    float* memory = reinterpret_cast<float*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    const Plan plan(*args);
#if defined(FLASH_AMX)
    if (args->dtype == 2 && !amx_granted()) return FLASH_NO_TILES;
#endif
    if (args->dtype == 0) run<float>(*args, plan, memory);
    else if (args->dtype == 1) run<half>(*args, plan, memory);
    else run<bfloat>(*args, plan, memory);
    return FLASH_DONE;
}
