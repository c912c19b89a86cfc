// Forward flash attention for compute capability 8.0 and up: cp.async feeds mma.sync, in tiles of any strides.
//
// One block owns a tile of up to ROWS rows of one key head: queries of PACK query heads that share it, a query's heads
// next to each other. ROW_WARPS × KEY_WARPS warps share it: each has ROWS/ROW_WARPS rows, on KEYS/KEY_WARPS keys of
// every key block. Scores, weights and sums stay in its registers. With STAGES > 1 there is one barrier (|) a key
// block, behind which all warps have done with the block before it, so that its place in the ring is free:
//
//     copies, STAGES 2   Q K0 V0 |        K1 V1         |        K2 V2         | …
//     each warp                  | QK0 · softmax0 · PV0 | QK1 · softmax1 · PV1 | …
//
// With STAGES 1 there are two, and what is copied is not what is multiplied; half the shared memory lets two blocks run
// on an SM, one of which multiplies while the other waits:
//
//     copies, STAGES 1   Q K0 |  V0 |        K1      |  V1 |        K2      | …
//     each warp               | QK0 | softmax0 · PV0 | QK1 | softmax1 · PV1 | …
//
// Where KEY_WARPS > 1, the warps' sums are added up at the end, in the order of their keys. Where PARTS is 1, rows are
// then written. Else that many blocks share the key blocks that a tile sees, and each has come to one part of its sums:
//
//     every block     O, unnormalised, with m and l, to global memory, which stays in L2; then counts itself
//     the last of     reads all parts, adds them up in their order, and writes the rows
//      its tile
//
// No block waits for another, so they may run in any order, and not all at once. It is one launch, and gives the same
// bits every time. The counters are at zero again after each; no two launches in flight may share them.
//
// Shared memory, in chunks of 16 bytes, permuted in each row so that eight rows' chunks of one column lie in all banks:
//
//     Q        ROWS rows of D
//     ring     STAGES × (K: KEYS rows of D, V: KEYS rows of DV)
//
// and after the last key block over both, from the start:
//
//     output   KEY_WARPS = 1: ROWS rows of DV in 16 bits, so that whole rows are written
//     sums     KEY_WARPS > 1: KEY_WARPS × ROWS rows of DV + 8 floats: O, reference, sum
//
// A part in global memory is ROWS rows of DV floats of O, and behind them ROWS times reference and sum. Rows that hold no
// query are neither written nor read.
//
// The source compiles for one configuration, given as macros:
//     HEAD_DIM, HEAD_DIM_V  multiples of 8; D and DV are these in whole steps of 16, the rest zeros
//     BF16                  0: fp16, 1: bf16
//     ROWS, KEYS            of a tile and of a key block
//     ROW_WARPS, KEY_WARPS  a warp has 16 or 32 rows, and a multiple of 16 keys
//     STAGES                of the ring
//     Q_REGISTERS           1: a warp keeps its queries in registers, 0: it reads them again for each key block
//     PACK                  query heads of a tile; a divisor of those that share a key head
//     PARTS                 blocks that share the keys of a tile
//     MASKED                1: causal or window
//     COPY                  bytes that addresses and strides of Q, K and V are multiples of: 16, 8, 4 or 2
// No header is included, so that NVRTC compiles it without a CUDA toolkit. With EMULATION, the name of a header, it is
// C++ for a CPU, and what stands below "PTX" is that header's (tests/cuda_emulation).

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

constexpr int D = (HEAD_DIM + 15) / 16 * 16, DV = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int THREADS = 32 * ROW_WARPS * KEY_WARPS;
constexpr int WARP_ROWS = ROWS / ROW_WARPS, WARP_KEYS = KEYS / KEY_WARPS;
constexpr int ROW_TILES = WARP_ROWS / 16;  // of mma.sync: a key's fragment is read once for all of them
constexpr int QUERIES = ROWS / PACK;       // of a tile
constexpr int SUMS_ROW = DV + 8;           // floats: four rows start in different banks
constexpr i64 PART_FLOATS = ROWS * (DV + 2);
constexpr u32 Q_BYTES = ROWS * D * 2, K_BYTES = KEYS * D * 2, V_BYTES = KEYS * DV * 2;
static_assert(ROWS % (16 * ROW_WARPS) == 0 && KEYS % (16 * KEY_WARPS) == 0, "warps have whole tiles of mma.sync");
static_assert(PARTS >= 1 && PARTS <= 32, "a part's first key block is computed in 32 bits");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0 && PACK <= ROWS, "rows are whole chunks");

extern "C" {

// Division by a number that is known before the launch: n / d = (mulhi(n, factor) + n) >> shift, for n < 2³¹.
struct Divisor {
    u32 value, factor, shift;
};

// A tensor of (batch, head, position, column); strides count elements, and columns are contiguous.
struct Strided {
    const u16* data;
    i64 batch, head, row;
};

struct Params {
    Strided q, k, v;
    void* out;           // (batch, heads_q, seqlen_q, head_dim_v), contiguous
    float* lse;          // (batch, heads_q, seqlen_q), contiguous, or null
    Divisor tiles;       // of one head group: PACK query heads
    Divisor groups;      // head groups of a batch element
    Divisor key_groups;  // head groups that share a key head
    Divisor wave;        // head groups whose tiles are dealt out together, their latest tiles first
    Divisor last_wave;   // as many as the last wave has
    u32 all_groups;      // of all batch elements
    int seqlen_q, seqlen_k;
    int ahead, behind;   // a query at key position p sees the keys from p - behind to below p + ahead
    float scale_log2;    // softmax_scale · log2(e)
    u32* arrived;        // where tiles have parts: of each tile, how many are there, all of them being none again
    float* parts;        // the same: (tile, part) of PART_FLOATS
};
}

// ---- PTX ----------------------------------------------------------------------------------------------------------

#ifdef EMULATION
#include EMULATION
#else
namespace {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// BYTES from global to shared memory; or zeros, and nothing is read, wherever `source` points.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 target, const u16* source, bool there) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(BYTES),
                     "r"(there ? BYTES : 0)
                     : "memory");
    }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// This thread's copies are there, but for those of the last PENDING groups.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 load_element(const u16* source) {
    u16 value;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(source) : "memory");
    return value;
}

__device__ __forceinline__ void store_global(void* target, uint4 value) { *static_cast<uint4*>(target) = value; }
__device__ __forceinline__ void store_global(void* target, uint2 value) { *static_cast<uint2*>(target) = value; }
__device__ __forceinline__ void store_global(float* target, float value) { *target = value; }

template <int N>
__device__ __forceinline__ void store_part(float* target, const float (&x)[N]) {
    if constexpr (N == 2) {
        asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(x[0]), "f"(x[1]) : "memory");
    } else {
        asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                     "f"(x[3])
                     : "memory");
    }
}

// From L2, where other SMs' parts are.
template <int N>
__device__ __forceinline__ void load_part(float (&x)[N], const float* source) {
    if constexpr (N == 2) {
        asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "l"(source) : "memory");
    } else {
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "l"(source)
                     : "memory");
    }
}

__device__ __forceinline__ void store_shared(u32 target, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 target, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 target, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(target), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 source) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(source)
                 : "memory");
    return value;
}

// Four 8 × 8 matrices, of whose rows each lane gives the address of one: lane i the row i % 8 of matrix i / 8.
// m[j] is then row lane / 4, columns 2·(lane % 4) and the next, of matrix j.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 source) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(source)
                 : "memory");
}

// The same with rows and columns exchanged.
__device__ __forceinline__ void load_transposed(u32 (&m)[4], u32 source) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(source)
                 : "memory");
}

#if BF16
#define TYPES "f32.bf16.bf16.f32"
#else
#define TYPES "f32.f16.f16.f32"
#endif

// d += a·b: 16 × 8, 16 deep.
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float inverse_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What is computed from x is computed again where it is needed, not kept in registers, of which there are too few.
__device__ __forceinline__ void recompute(u32& x) { asm volatile("" : "+r"(x)); }

// Two floats as 16-bit values in one register, `low` at the lower address.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

}  // namespace
#endif

namespace {

#define MINUS_INFINITY __int_as_float(0xFF800000)
constexpr u32 ALL_LANES = 0xFFFFFFFF;

// ---- the tile -----------------------------------------------------------------------------------------------------

struct Tile {
    int batch, group;  // of PACK query heads
    int query;         // the first
    int block, end;    // the key blocks that some row sees, or a part of them: the first, and the one after the last
};

__device__ __forceinline__ u32 operator/(u32 n, const Divisor& d) { return (__umulhi(n, d.factor) + n) >> d.shift; }

__device__ __forceinline__ int low_key(const Params& p, int position) {
    return MASKED ? max(0, position - p.behind) : 0;
}

__device__ __forceinline__ int high_key(const Params& p, int position) {
    return MASKED ? min(p.seqlen_k, position + p.ahead) : p.seqlen_k;
}

// Of a tile's row: where its query stands among the keys.
__device__ __forceinline__ int position_of(const Params& p, const Tile& tile, int row) {
    return tile.query + row / PACK + p.seqlen_k - p.seqlen_q;
}

// Of a block of threads. Its part of the key blocks may be none.
__device__ __forceinline__ Tile tile_of(const Params& p, u32 number) {
    Tile tile;
    const u32 work = number / PARTS;
    u32 all_groups = work / p.tiles, tiles_left = work - all_groups * p.tiles.value;  // a wave of one group
    if (MASKED) {
        const u32 wave = all_groups / p.wave, first = wave * p.wave.value;
        const Divisor& groups = first + p.wave.value > p.all_groups ? p.last_wave : p.wave;
        const u32 within = work - first * p.tiles.value;
        tiles_left = within / groups;
        all_groups = first + within - tiles_left * groups.value;
    }
    tile.batch = all_groups / p.groups;
    tile.group = all_groups - tile.batch * p.groups.value;
    tile.query = (p.tiles.value - 1 - tiles_left) * QUERIES;
    const int last = min(p.seqlen_q, tile.query + QUERIES) - 1 - tile.query;
    const int low = low_key(p, position_of(p, tile, 0));
    const int high = max(low, high_key(p, position_of(p, tile, last * PACK)));
    tile.block = low / KEYS, tile.end = (high + KEYS - 1) / KEYS;
    if (PARTS > 1) {
        const int first = tile.block, blocks = tile.end - first, part = number % PARTS;
        tile.block = first + blocks * part / PARTS, tile.end = first + blocks * (part + 1) / PARTS;
    }
    return tile;
}

// Rows that hold a query: the first so many.
__device__ __forceinline__ int rows_of(const Params& p, const Tile& tile) {
    return min(QUERIES, p.seqlen_q - tile.query) * PACK;
}

// Where a warp's first and last query stand among the keys.
struct Span {
    int first, last;

    __device__ __forceinline__ Span(const Params& p, const Tile& tile, int first_row)
        : first(position_of(p, tile, first_row)),
          last(min(position_of(p, tile, first_row + WARP_ROWS - 1), p.seqlen_k - 1)) {}

    // Whether some of the warp's rows see any of its keys from `key` on, and whether all see all.
    __device__ __forceinline__ bool some(const Params& p, int key) const {
        return first <= last && key < high_key(p, last) && key + WARP_KEYS > low_key(p, first);
    }
    __device__ __forceinline__ bool all(const Params& p, int key) const {
        return key >= low_key(p, last) && key + WARP_KEYS <= high_key(p, first);
    }
};

// Rows of CHUNKS that are 8 / SPAN apart begin in the same bank; their chunks are permuted, SPAN by SPAN.
template <int CHUNKS>
constexpr u32 SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;

// Byte of a chunk in such rows.
template <int CHUNKS>
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) {
    return row * (CHUNKS * 16) + (chunk ^ (row / (8 / SPAN<CHUNKS>) % SPAN<CHUNKS>)) * 16;
}

// Address of the chunk 2·step further right than one in the first two columns.
template <int CHUNKS>
__device__ __forceinline__ u32 further(u32 address, u32 step) {
    constexpr u32 STEPS = SPAN<CHUNKS> / 2;
    return (address ^ step % STEPS * 32) + step / STEPS * (STEPS * 32);
}

// ---- from global to shared memory ---------------------------------------------------------------------------------

__device__ __forceinline__ void copy_chunk(u32 target, const u16* source, bool there) {
    if constexpr (COPY > 2) {
#pragma unroll
        for (int byte = 0; byte < 16; byte += COPY) copy_async<COPY>(target + byte, source + byte / 2, there);
    } else {  // less than cp.async takes
        u32 x[8] = {};
        if (there) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = load_element(source + i);
        }
        store_shared(target, uint4{x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16});
    }
}

// Which chunks of COUNT rows of COLUMNS a thread copies: of every STEP rows one, and of that every SIDE chunks one, so
// that they lie at offsets from the first which all threads have in common.
template <int COUNT, int COLUMNS>
struct Share {
    static constexpr u32 CHUNKS = (COLUMNS + 15) / 16 * 2, SIDE = CHUNKS & (0 - CHUNKS), SEGMENTS = CHUNKS / SIDE;
    static constexpr u32 STEP = THREADS / SIDE, MOST = (COUNT + STEP - 1) / STEP * SEGMENTS;

    __device__ __forceinline__ static u32 row(u32 i) { return threadIdx.x / SIDE + i / SEGMENTS * STEP; }
    __device__ __forceinline__ static u32 chunk(u32 i) { return threadIdx.x % SIDE + i % SEGMENTS * SIDE; }
    __device__ __forceinline__ static bool has(u32 i) { return COUNT % STEP == 0 || row(i) < COUNT; }
    // Not of the columns that D or DV has beyond.
    __device__ __forceinline__ static bool inside(u32 i) { return COLUMNS % 16 == 0 || chunk(i) * 8 < COLUMNS; }
    __device__ __forceinline__ static u32 place(u32 i) { return swizzled<CHUNKS>(row(i), chunk(i)); }
};

__device__ __forceinline__ void copy_queries(const Params& p, const Tile& tile, u32 target) {
    using Mine = Share<ROWS, HEAD_DIM>;
    const u16* const first = p.q.data + tile.batch * p.q.batch + i64(tile.group) * PACK * p.q.head;
#pragma unroll
    for (u32 i = 0; i < Mine::MOST; ++i) {
        if (!Mine::has(i)) break;
        const int row = Mine::row(i), query = tile.query + row / PACK;
        const u16* const source = first + row % PACK * p.q.head + query * p.q.row + Mine::chunk(i) * 8;
        copy_chunk(target + Mine::place(i), source, row < QUERIES * PACK && query < p.seqlen_q && Mine::inside(i));
    }
}

// The key block from `key` on, of K or of V; `head` is the tile's.
template <int COLUMNS>
__device__ __forceinline__ void copy_keys(const Params& p, const u16* head, i64 stride, int key, u32 target) {
    using Mine = Share<KEYS, COLUMNS>;
    const int left = p.seqlen_k - key;
    const u16* const first = head + (key + i64(Mine::row(0))) * stride + Mine::chunk(0) * 8;
#pragma unroll
    for (u32 i = 0; i < Mine::MOST; ++i) {
        if (!Mine::has(i)) break;
        const u16* const row = first + i / Mine::SEGMENTS * Mine::STEP * stride;
        const u16* const source = row + i % Mine::SEGMENTS * Mine::SIDE * 8;
        copy_chunk(target + Mine::place(i), source, int(Mine::row(i)) < left && Mine::inside(i));
    }
}

// ---- one warp's rows ----------------------------------------------------------------------------------------------
// A lane holds two rows of each tile of mma.sync, 8 apart: x[m][n][2h + e] is row 16m + lane/4 + 8h, column
// 8n + 2·(lane % 4) + e, of scores and of O.

using Scores = float[ROW_TILES][WARP_KEYS / 8][4];
using Output = float[ROW_TILES][DV / 8][4];
using Queries = u32[ROW_TILES][4];

// Where a lane's rows for ldmatrix are in shared memory, in a warp's first tile of Q, K and V: such that a register of
// the result, or two next to each other, are what mma.sync takes.
struct Fragments {
    u32 q, k, v;

    __device__ __forceinline__ Fragments(u32 q_row, u32 k_row, u32 v_row, int lane)
        : q(q_row + swizzled<D / 8>(lane % 16, lane / 16)),
          k(k_row + swizzled<D / 8>(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
          v(v_row + swizzled<DV / 8>(lane % 16, lane / 16)) {}
};

__device__ __forceinline__ void load_queries(u32 q, int step, Queries& a) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) load_matrices(a[m], further<D / 8>(q, step) + m * 16 * D * 2);
}

__device__ __forceinline__ void multiply_scores(u32 q, const Queries (&kept)[D / 16], u32 k, Scores& s) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
        }
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        Queries read;
        if (!Q_REGISTERS) load_queries(q, step, read);
        const u32(*const a)[4] = Q_REGISTERS ? kept[step] : read;
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n += 2) {
            u32 b[4];
            load_matrices(b, further<D / 8>(k, step) + n * 8 * D * 2);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                multiply_add(s[m][n], a[m], b[0], b[1]);
                multiply_add(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// A lane holds the weights as mma.sync wants them.
__device__ __forceinline__ void multiply_values(const Scores& s, u32 v, Output& o) {
#pragma unroll
    for (int step = 0; step < WARP_KEYS / 16; ++step) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const two = s[m][2 * step + i / 2] + i % 2 * 2;
                a[m][i] = pack(two[0], two[1]);
            }
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            u32 b[4];
            load_transposed(b, further<DV / 8>(v, n / 2) + step * 16 * DV * 2);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                multiply_add(o[m][n], a[m], b[0], b[1]);
                multiply_add(o[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// `key` is the warp's first.
__device__ __forceinline__ void mask(const Params& p, const Tile& tile, int first_row, int key, int lane, Scores& s) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int position = position_of(p, tile, first_row + 16 * m + lane / 4 + 8 * h);
            const int first = key + lane % 4 * 2;
            const int low = low_key(p, position) - first, high = high_key(p, position) - first;
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (8 * n + e < low || 8 * n + e >= high) s[m][n][2 * h + e] = MINUS_INFINITY;
                }
            }
        }
    }
}

// A weight is exp2(scale · (score - reference)), and a reference stays until one would be above 2^LATE: sums are then
// rarely rescaled, and weights are as precise as they would be below 1.
constexpr float LATE = 8;
// From this scaled reference on, scores and reference are subtracted before they are scaled. Below it the rounding of
// their products is at most 2⁻¹⁵, and one operation does for both.
constexpr float FAR = 1024;

struct Softmax {
    float reference[ROW_TILES][2];  // of the scores as they are, not scaled
    float sum[ROW_TILES][2];        // of this lane's columns

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) reference[i / 2][i % 2] = MINUS_INFINITY, sum[i / 2][i % 2] = 0;
    }

    // Turns scores into weights.
    __device__ __forceinline__ void update(Scores& s, float scale, Output& o) {
        float top[ROW_TILES][2];
        bool late = false;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = MINUS_INFINITY;
#pragma unroll
                for (int n = 0; n < WARP_KEYS / 8; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
                top[m][h] = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
                late |= (top[m][h] - reference[m][h]) * scale > LATE;  // not where both are -inf
            }
        }
        if (__any_sync(ALL_LANES, late)) rescale(top, scale, o);

        float base[ROW_TILES][2], shift[ROW_TILES][2];
        bool far = false;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                base[m][h] = finite(reference[m][h]);
                shift[m][h] = base[m][h] * scale;
                far |= fabsf(shift[m][h]) >= FAR;
            }
        }
        if (__any_sync(ALL_LANES, far)) subtract(s, base, shift);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[m][n][i] = exp2_approx(s[m][n][i] * scale - shift[m][i / 2]);
                    sum[m][i / 2] += s[m][n][i];
                }
            }
        }
    }

    // A row that has seen no key above -inf has weights of zero, not of exp2(-inf + inf).
    __device__ __forceinline__ static float finite(float x) { return x == MINUS_INFINITY ? 0.0f : x; }

    __device__ __forceinline__ void rescale(const float (&top)[ROW_TILES][2], float scale, Output& o) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float now = fmaxf(reference[m][h], top[m][h]);
                const float factor = exp2_approx((reference[m][h] - finite(now)) * scale);
                reference[m][h] = now;
                sum[m][h] *= factor;
#pragma unroll
                for (int n = 0; n < DV / 8; ++n) o[m][n][2 * h] *= factor, o[m][n][2 * h + 1] *= factor;
            }
        }
    }

    __device__ __forceinline__ static void subtract(Scores& s, const float (&base)[ROW_TILES][2],
                                                    float (&shift)[ROW_TILES][2]) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] -= base[m][i / 2];
            }
            shift[m][0] = shift[m][1] = 0;
        }
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                sum[m][h] += __shfl_xor_sync(ALL_LANES, sum[m][h], 1);
                sum[m][h] += __shfl_xor_sync(ALL_LANES, sum[m][h], 2);
            }
        }
    }
};

// Of a condition that is the same in all lanes; the compiler does not know, and would guard what lanes do together.
__device__ __forceinline__ bool uniform(bool condition) { return __any_sync(ALL_LANES, condition); }

struct Warp {
    int lane, first_row, first_key;  // of the tile, and of each key block

    __device__ __forceinline__ explicit Warp(int thread)
        : lane(thread % 32),
          first_row(thread / 32 % ROW_WARPS * WARP_ROWS),
          first_key(thread / 32 / ROW_WARPS * WARP_KEYS) {}
};

__device__ __forceinline__ void attend(const Params& p, const Tile& tile, const Warp& warp, u32 memory, Output& o,
                                       Softmax& softmax) {
    const int key_head = u32(tile.group) / p.key_groups;
    const u16* const k_head = p.k.data + tile.batch * p.k.batch + key_head * p.k.head;
    const u16* const v_head = p.v.data + tile.batch * p.v.batch + key_head * p.v.head;
    const auto place = [&](int block) { return memory + Q_BYTES + block % STAGES * (K_BYTES + V_BYTES); };
    const auto copy_k = [&](int block) {
        if (block < tile.end) copy_keys<HEAD_DIM>(p, k_head, p.k.row, block * KEYS, place(block));
    };
    const auto copy_v = [&](int block) {
        if (block < tile.end) copy_keys<HEAD_DIM_V>(p, v_head, p.v.row, block * KEYS, place(block) + K_BYTES);
    };
    copy_queries(p, tile, memory);
    if (STAGES == 1) copy_k(tile.block), copy_commit();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy_k(tile.block + i), copy_v(tile.block + i), copy_commit();

    const Span span(p, tile, warp.first_row);
    Fragments at(memory + warp.first_row * D * 2, memory + Q_BYTES + warp.first_key * D * 2,
                 memory + Q_BYTES + K_BYTES + warp.first_key * DV * 2, warp.lane);
    Queries kept[D / 16];
    for (int block = tile.block; block < tile.end; ++block) {
        copy_wait<STAGES == 1 ? 0 : STAGES - 2>();
        __syncthreads();
        if (Q_REGISTERS && block == tile.block) {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) load_queries(at.q, step, kept[step]);
        }
        if (STAGES == 1) {
            copy_v(block);
        } else {
            copy_k(block + STAGES - 1), copy_v(block + STAGES - 1);
        }
        copy_commit();
        recompute(at.q), recompute(at.k), recompute(at.v);
        const u32 stage = block % STAGES * (K_BYTES + V_BYTES);
        const int key = block * KEYS + warp.first_key;
        // Others' rows, and other warps' keys, may be seen where none of this warp's are.
        const bool some = (!MASKED && KEY_WARPS == 1) || uniform(span.some(p, key));
        Scores s;
        if (some) multiply_scores(at.q, kept, at.k + stage, s);
        if (STAGES == 1) {
            copy_wait<0>();
            __syncthreads();
            copy_k(block + 1), copy_commit();
        }
        if (some) {
            if (!uniform(span.all(p, key))) mask(p, tile, warp.first_row, key, warp.lane, s);
            softmax.update(s, p.scale_log2, o);
            multiply_values(s, at.v + stage, o);
        }
    }
    copy_wait<0>();
    softmax.finish();
    __syncthreads();  // all have read what the output lies over
}

// ---- the output ---------------------------------------------------------------------------------------------------

struct Row {
    i64 index;   // of (batch, heads_q, seqlen_q)
    bool valid;
    bool blind;  // it sees no key, which is not to see keys of scores that are -inf

    __device__ __forceinline__ Row(const Params& p, const Tile& tile, int row) {
        const int query = tile.query + row / PACK, position = position_of(p, tile, row);
        const u32 head = (tile.batch * p.groups.value + tile.group) * PACK + row % PACK;
        index = i64(head) * p.seqlen_q + query;
        valid = row < QUERIES * PACK && query < p.seqlen_q;
        blind = MASKED && low_key(p, position) >= high_key(p, position);
    }
};

// Hidden values may be infinite or NaN, and so may what they were multiplied by zero into.
__device__ __forceinline__ u32 normalised(const Row& row, float low, float high, float inverse) {
    return row.blind ? 0 : pack(low * inverse, high * inverse);
}

__device__ __forceinline__ float log_sum(float reference, float sum, float scale_log2) {
    constexpr float LN2 = 0.693147180559945309f;
    return (reference * scale_log2 + log2_approx(sum)) * LN2;
}

__device__ __forceinline__ void write(const Params& p, const Row& row, int chunk, uint4 value) {
    if (row.valid && chunk * 8 < HEAD_DIM_V) {
        store_global(static_cast<u16*>(p.out) + row.index * HEAD_DIM_V + chunk * 8, value);
    }
}

// A warp's rows, through shared memory, so that whole rows are written.
__device__ __forceinline__ void write_rows(const Params& p, const Tile& tile, const Warp& warp, u32 memory,
                                           const Output& o, const Softmax& softmax) {
    const u32 staged = memory + warp.first_row * DV * 2;
    const int lane = warp.lane;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = 16 * m + lane / 4 + 8 * h;
            const Row row(p, tile, warp.first_row + at);
            const float inverse = inverse_approx(softmax.sum[m][h]);
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) {
                store_shared(staged + swizzled<DV / 8>(at, n) + lane % 4 * 4,
                             normalised(row, o[m][n][2 * h], o[m][n][2 * h + 1], inverse));
            }
            if (p.lse && lane % 4 == 0 && row.valid) {
                store_global(p.lse + row.index, log_sum(softmax.reference[m][h], softmax.sum[m][h], p.scale_log2));
            }
        }
    }
    __syncwarp();
    constexpr int CHUNKS = DV / 8;
#pragma unroll 4
    for (int index = lane; index < WARP_ROWS * CHUNKS; index += 32) {
        const int at = index / CHUNKS, chunk = index % CHUNKS;
        write(p, Row(p, tile, warp.first_row + at), chunk, load_shared(staged + swizzled<CHUNKS>(at, chunk)));
    }
}

// ---- sums of several warps, and of several blocks -----------------------------------------------------------------

// What a warp of KEY_WARPS has come to, to shared memory.
__device__ __forceinline__ void keep_sums(const Warp& warp, u32 memory, const Output& o, const Softmax& softmax) {
    const int lane = warp.lane, index = warp.first_key / WARP_KEYS;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 row = memory + (index * ROWS + warp.first_row + 16 * m + lane / 4 + 8 * h) * SUMS_ROW * 4;
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) {
                store_shared(row + (8 * n + lane % 4 * 2) * 4, o[m][n][2 * h], o[m][n][2 * h + 1]);
            }
            if (lane % 4 == 0) store_shared(row + DV * 4, softmax.reference[m][h], softmax.sum[m][h]);
        }
    }
}

// Adds up the warps' sums, and writes the rows; or, where tiles have parts, this block's.
__device__ __forceinline__ void add_warps(const Params& p, const Tile& tile, u32 memory, float* part) {
    constexpr int CHUNKS = DV / 8;
    for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        const int at = index / CHUNKS, chunk = index % CHUNKS;
        const u32 first = memory + at * SUMS_ROW * 4;
        float reference[KEY_WARPS], sums[KEY_WARPS], top = MINUS_INFINITY;
#pragma unroll
        for (int i = 0; i < KEY_WARPS; ++i) {
            const uint4 state = load_shared(first + (i * ROWS * SUMS_ROW + DV) * 4);
            reference[i] = __int_as_float(state.x), sums[i] = __int_as_float(state.y);
            top = fmaxf(top, reference[i]);
        }
        float sum = 0, total[8] = {};
#pragma unroll
        for (int i = 0; i < KEY_WARPS; ++i) {
            const float weight = exp2_approx((reference[i] - Softmax::finite(top)) * p.scale_log2);
            sum += sums[i] * weight;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 x = load_shared(first + (i * ROWS * SUMS_ROW + 8 * chunk + 4 * half) * 4);
                total[4 * half] += __int_as_float(x.x) * weight;
                total[4 * half + 1] += __int_as_float(x.y) * weight;
                total[4 * half + 2] += __int_as_float(x.z) * weight;
                total[4 * half + 3] += __int_as_float(x.w) * weight;
            }
        }
        if (PARTS > 1) {
            if (at >= rows_of(p, tile)) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* const x = total + 4 * half;
                store_part(part + at * DV + 8 * chunk + 4 * half, {x[0], x[1], x[2], x[3]});
            }
            if (chunk == 0) store_part(part + ROWS * DV + 2 * at, {top, sum});
        } else {
            const Row row(p, tile, at);
            const float inverse = inverse_approx(sum);
            const auto both = [&](int i) { return normalised(row, total[i], total[i + 1], inverse); };
            write(p, row, chunk, uint4{both(0), both(2), both(4), both(6)});
            if (p.lse && chunk == 0 && row.valid) store_global(p.lse + row.index, log_sum(top, sum, p.scale_log2));
        }
    }
}

// The rows of a warp that alone has them, to its block's part: four lanes write 32 bytes of a row.
__device__ __forceinline__ void write_part(const Params& p, const Tile& tile, const Warp& warp, const Output& o,
                                           const Softmax& softmax, float* part) {
    const int lane = warp.lane;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = warp.first_row + 16 * m + lane / 4 + 8 * h;
            if (at >= rows_of(p, tile)) continue;
#pragma unroll
            for (int n = 0; n < DV / 8; ++n) {
                store_part(part + at * DV + 8 * n + lane % 4 * 2, {o[m][n][2 * h], o[m][n][2 * h + 1]});
            }
            if (lane % 4 == 0) store_part(part + ROWS * DV + 2 * at, {softmax.reference[m][h], softmax.sum[m][h]});
        }
    }
}

// Counts this block's part; true in the block that comes last, which then sees all parts of the tile. The counter goes
// from PARTS - 1 to 0, and so is ready for the next launch.
__device__ __forceinline__ bool is_last(u32* arrived) {
    bool last = false;
    __syncthreads();  // all have written; a fence of one thread then is one for all of them
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(arrived, PARTS - 1) == PARTS - 1;
        __threadfence();
    }
    return __syncthreads_or(last);
}

// Four columns of a row, over the parts so far.
struct Sum {
    float reference, sum, total[4];

    template <int N>
    __device__ __forceinline__ void add(const float (&o)[N][4], const float (&states)[N][2], int count, float scale) {
        float now = reference;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < count) now = fmaxf(now, states[i][0]);
        }
        const float base = Softmax::finite(now), factor = exp2_approx((reference - base) * scale);
        reference = now, sum *= factor;
#pragma unroll
        for (int c = 0; c < 4; ++c) total[c] *= factor;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i >= count) break;
            const float weight = exp2_approx((states[i][0] - base) * scale);
            sum += states[i][1] * weight;
#pragma unroll
            for (int c = 0; c < 4; ++c) total[c] += o[i][c] * weight;
        }
    }
};

// Adds up the parts of a tile and writes its rows. One block does so while others have nothing to do: what counts is how
// much it has asked for at once, which is 16 times 16 bytes a thread.
__device__ __forceinline__ void add_parts(const Params& p, const Tile& tile, const float* parts) {
    constexpr int CHUNKS = DV / 4, TURNS = (ROWS * CHUNKS + THREADS - 1) / THREADS;
    constexpr int ROUNDS = (PARTS + 15) / 16, BATCH = (PARTS + ROUNDS - 1) / ROUNDS;
    constexpr int TOGETHER = TURNS < 16 / BATCH ? TURNS : 16 / BATCH;
    const int count = rows_of(p, tile) * CHUNKS;
    for (int start = threadIdx.x; start < count; start += THREADS * TOGETHER) {
        Sum sums[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) sums[j] = Sum{MINUS_INFINITY, 0, {0, 0, 0, 0}};
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int left = PARTS - round * BATCH;
            float o[TOGETHER][BATCH][4], states[TOGETHER][BATCH][2];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (i >= left) break;
                const float* const part = parts + (round * BATCH + i) * PART_FLOATS;
#pragma unroll
                for (int j = 0; j < TOGETHER; ++j) {
                    const int index = min(start + j * THREADS, count - 1);
                    load_part(o[j][i], part + 4 * index);
                    load_part(states[j][i], part + ROWS * DV + index / CHUNKS * 2);
                }
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) sums[j].add(o[j], states[j], left, p.scale_log2);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            const int index = start + j * THREADS, column = index % CHUNKS * 4;
            if (index >= count) break;
            const Sum& x = sums[j];
            const Row row(p, tile, index / CHUNKS);
            const float inverse = inverse_approx(x.sum);
            if (column < HEAD_DIM_V) {
                store_global(static_cast<u16*>(p.out) + row.index * HEAD_DIM_V + column,
                             uint2{normalised(row, x.total[0], x.total[1], inverse),
                                   normalised(row, x.total[2], x.total[3], inverse)});
            }
            if (p.lse && column == 0) store_global(p.lse + row.index, log_sum(x.reference, x.sum, p.scale_log2));
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) flash_attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const u32 base = shared_address(memory);
    const Warp warp(threadIdx.x);
    Output o;
#pragma unroll
    for (int i = 0; i < ROW_TILES * DV / 2; ++i) o[i / (DV / 2)][i / 4 % (DV / 8)][i % 4] = 0;
    Softmax softmax;
    u32 number = blockIdx.x;
    attend(p, tile_of(p, number), warp, base, o, softmax);
    recompute(number);
    const Tile tile = tile_of(p, number);
    const u32 work = number / PARTS;
    float* const parts = PARTS > 1 ? p.parts + work * (PARTS * PART_FLOATS) : nullptr;
    float* const part = PARTS > 1 ? parts + number % PARTS * PART_FLOATS : nullptr;
    if (KEY_WARPS > 1) {
        keep_sums(warp, base, o, softmax);
        __syncthreads();
        add_warps(p, tile, base, part);
    } else if (PARTS > 1) {
        write_part(p, tile, warp, o, softmax, part);
    } else {
        write_rows(p, tile, warp, base, o, softmax);
    }
    if (PARTS > 1 && is_last(p.arrived + work)) add_parts(p, tile, parts);
}
