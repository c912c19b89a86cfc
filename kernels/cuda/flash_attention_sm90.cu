// Forward flash attention for Hopper (sm_90a): TMA feeds wgmma, warps are specialised, keys are split between blocks.
//
// A tile is up to ROWS rows of one key head (queries of PACK query heads that share it, a query's heads next to each
// other) and DV columns of V. PARTS blocks work on it, each on a share of the key blocks that the tile sees:
//
//     producer        Q K0 V0 K1 K2 V1 K3 V2 …     one thread: TMA into a ring of STAGES, as far as the ring is free
//     consumer 0      QK0 · softmax0 · [QK1 PV0] · softmax1 · [QK2 PV1] · softmax2 …
//     consumer 1      the same on 64 rows more, where ROWS is 128; or, where SHARED_ROWS is 2, on every other key block
//                     of the same rows: each then adds up half of the columns of both
//
// […] are issued together: the tensor cores work on PV of one block and QK of the next while the softmax of the latter
// waits for its scores alone. Where PERSISTENT and not WINDOW, only a tile's first softmax looks for the greatest score.
// What it finds is subtracted from those of the other blocks too, unless their weights add up to more than MOST_WEIGHT:
// then QK is computed again, and the greatest score looked for. Where PARTS is 1:
//
//     consumers       write their rows from registers; where PERSISTENT, the last […] of a tile has QK of the next one, and
//                     its rows are written after the softmax of that
//
// and where a tile has several parts:
//
//     every block     O, unnormalised, with m and l, to global memory, which stays in L2
//     every block     adds its 1/PARTS of the tile over all parts, in the order of the parts, and writes it
//
// So the sum runs in parallel, in one launch, and gives the same bits every time. Nobody tells that a part is there: every 16
// bytes of it, which are written and read at once, carry the number of the launch, and whoever adds them up reads them until
// they do. As blocks wait for each other, all must run at once, in a cooperative launch.
//
// A part is made of pieces: 16 columns of 8 rows, 32 lanes × 4 floats, the last of them without its last 8 bits, which are the
// launch's. Those are enough, as every launch writes all that is read: what is stale is always of the launch before. Piece
// j + DV/16 · half has columns 16j … 16j + 15 of rows 8 · half … 8 · half + 7.
//
// Shared memory, from a base aligned to 1024 bytes (128-byte swizzle, as TMA writes it and wgmma reads it):
//
//     Q        D/64 boxes of ROWS × 128 bytes; twice, where PERSISTENT and there are no registers to keep Q in
//     ring     STAGES × (K: D/64 boxes of KEYS × 128 bytes, V: DV/64 of them); at the end, where several warps add up a piece,
//              what came of it
//     halves   where SHARED_ROWS is 2, what each consumer hands over: half of its O, m and l, thread by thread
//     barriers q_full, q_empty, number of the tile [2 each]; k_full, k_empty, v_full, v_empty [STAGES]
//
// The source compiles for one configuration, given as macros:
//     D       head size of Q and K, rounded up to 64; TMA fills the rest with zeros
//     DV      columns of V that a block works on: a multiple of 64
//     SPLIT_V blocks that work on the same queries and keys, each with columns of its own
//     BF16    0: fp16, 1: bf16
//     ROWS    64 or 128
//     SHARED_ROWS  consumers that work on the same rows: 1, or 2 where ROWS is 64
//     KEYS    keys of a block: 64, 128 or 176
//     STAGES  of the ring
//     PARTS   blocks that share the keys of a tile
//     PERSISTENT 1: blocks take tiles until there are no more; PARTS and SHARED_ROWS are 1 then, and no tile is without keys
//     PACK    query heads of a tile; a divisor of those that share a key head
//     MASKED  1: causal or window
//     WINDOW  1: window
//     SHARED_BYTES  of a block, that it is launched with
// No header is included, so that NVRTC compiles it without a CUDA toolkit.

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define MINUS_INFINITY __int_as_float(0xFF800000)
#define NOT_A_NUMBER __int_as_float(0x7FC00000)

constexpr float LARGEST = 1 << 28;  // scaled score
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = ROWS / 64 * SHARED_ROWS;
constexpr int CONSUMER_THREADS = CONSUMERS * WARPGROUP;
constexpr int THREADS = CONSUMER_THREADS + WARPGROUP;
constexpr int QUERIES = ROWS / PACK;  // of a tile
constexpr int BOX_COLUMNS = 64;       // of 2 bytes: the 128 bytes of a swizzled row
constexpr int BOX_ROW_BYTES = 128;
// Registers of a thread: it has 232, of which all else takes up to 40.
constexpr int LARGE_ARRAYS = KEYS / 2 + KEYS / 4 + DV / 2 + D / 4;  // scores, weights, output and queries
constexpr bool Q_IN_REGISTERS = PERSISTENT && LARGE_ARRAYS <= 192;
constexpr int Q_BUFFERS = PERSISTENT && !Q_IN_REGISTERS ? 2 : 1;
constexpr u32 Q_BUFFER_BYTES = ROWS * D * 2, Q_BYTES = Q_BUFFERS * Q_BUFFER_BYTES;
constexpr u32 K_BYTES = KEYS * D * 2, V_BYTES = KEYS * DV * 2;
constexpr u32 RING_BYTES = STAGES * (K_BYTES + V_BYTES);
constexpr u32 HALF_BYTES = (DV / 4 + 4) * WARPGROUP * 4, HALVES_BYTES = SHARED_ROWS > 1 ? 2 * HALF_BYTES : 0;
constexpr u32 BARRIER_BYTES = 8 * (5 + 4 * STAGES);
static_assert(Q_BYTES + RING_BYTES + HALVES_BYTES + BARRIER_BYTES <= SHARED_BYTES, "room");

// Whether the other key blocks are weighed by the greatest score of a tile's first. With a window many rows see no key of
// that one, and would have to be looked at again.
constexpr bool GUESSED = PERSISTENT && !WINDOW;
// What a thread's weights of a key block add up to, at most, for the scores to be taken for small enough: what fp16 holds
// goes to 2¹⁶, and bf16 and the sums of weights and values in fp32 go to 2¹²⁷. A weight's precision does not depend on it.
constexpr float MOST_WEIGHT = BF16 ? 1.8446744e19f : 32768.0f;  // 2⁶⁴, 2¹⁵
constexpr int TILE_ROWS = QUERIES * PACK;  // what TMA fills: the others hold what was there before

// Columns of 8 keys whose weights are computed before the last products are waited for, where every block's greatest score
// is looked for.
constexpr int EARLY = KEYS / 16;

constexpr int CHUNKS = DV / 8;  // of 8 columns

// Of a part; a warp has 16 rows.
constexpr int HALF_PIECES = DV / 16, WARP_PIECES = 2 * HALF_PIECES, TILE_PIECES = ROWS / 16 * WARP_PIECES;
constexpr u32 PIECE_BYTES = 512, STATE_BYTES = 16;  // the latter of a row: m, l, and the launch's number
constexpr u32 PART_BYTES = TILE_PIECES * PIECE_BYTES + ROWS * STATE_BYTES;
// A block adds up 1/PARTS of the pieces. Where it has more warps than pieces, several share one, each with some of the parts.
constexpr int CONSUMER_WARPS = CONSUMER_THREADS / 32, SLICE_PIECES = (TILE_PIECES + PARTS - 1) / PARTS;
__host__ __device__ constexpr int warps_of_a_piece() {
    int warps = 1;
    while (2 * warps * SLICE_PIECES <= CONSUMER_WARPS && 2 * warps <= PARTS) warps *= 2;
    return warps;
}
constexpr int PIECE_WARPS = warps_of_a_piece();
static_assert(SHARED_ROWS == 1 || (ROWS == 64 && STAGES % 2 == 0), "a stage belongs to one of two consumers");
static_assert(!PERSISTENT || (PARTS == 1 && SHARED_ROWS == 1), "the ring goes on from tile to tile");

extern "C" {

// A CUtensorMap with 128-byte swizzle: (batch, key head, key, column) of K or V in boxes of KEYS × 64, or (batch,
// heads_q / PACK, query, PACK, column) of Q in boxes of QUERIES × PACK × 64.
struct alignas(64) TensorMap {
    u64 words[16];
};

// Division by a number that is known before the launch: n / d = (mulhi(n, factor) + n) >> shift, for n < 2³¹.
struct Divisor {
    u32 value, factor, shift;
};

struct Params {
    void* out;           // (batch, heads_q, seqlen_q, head_dim_v), contiguous
    float* lse;          // (batch, heads_q, seqlen_q), contiguous, or null
    Divisor tiles;       // of one head group: PACK query heads
    Divisor groups;      // head groups of a batch element
    Divisor key_groups;  // head groups that share a key head
    Divisor wave;        // head groups whose tiles are dealt out together, their latest tiles first
    Divisor last_wave;   // as many as the last wave has
    u32 all_groups;      // of all batch elements
    u32 tiles_in_all;    // of all head groups, and of all columns of V
    u64* taken;          // where PERSISTENT: tiles, over all launches
    u32* launches;       // where tiles have parts: of each block, how many there were before this one
    unsigned char* parts;  // the same: (tile, part) of PART_BYTES
    int seqlen_q, seqlen_k, head_dim_v;
    int ahead, behind;   // a query at key position p sees the keys from p - behind to below p + ahead
    float scale_log2;    // softmax_scale · log2(e)
};
}

namespace {

// ---- PTX ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, u32 barrier, int column, int key, int head,
                                         int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(target),
        "l"(&map), "r"(column), "r"(key), "r"(head), "r"(batch), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, u32 barrier, int column, int query, int group,
                                         int batch, int packed) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
        "%6}], [%7];" ::"r"(target),
        "l"(&map), "r"(column), "r"(packed), "r"(query), "r"(group), "r"(batch), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// One lane of a warp; the compiler knows that it is one, and issues a copy without asking which lanes want it.
__device__ __forceinline__ bool elect() {
    u32 is;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(is));
    return is;
}

__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(u32 address, float4 x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_shared_four(u32 address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

// Four matrices of 8 × 8 values: lanes 8i to 8i + 7 know the rows of the i-th, 16 bytes each.
__device__ __forceinline__ void load_matrices(u32* words, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes that other blocks see all at once, or not at all.
__device__ __forceinline__ void store_relaxed(void* address, uint4 x) {
    asm volatile(
        "{\n.reg .b128 all;\n.reg .b64 low, high;\nmov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\n"
        "mov.b128 all, {low, high};\nst.relaxed.gpu.global.b128 [%0], all;\n}\n" ::"l"(address),
        "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
}

__device__ __forceinline__ uint4 load_relaxed(const void* address) {
    uint4 x;
    asm volatile(
        "{\n.reg .b128 all;\n.reg .b64 low, high;\nld.relaxed.gpu.global.b128 all, [%4];\n"
        "mov.b128 {low, high}, all;\nmov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}\n"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(address)
        : "memory");
    return x;
}

__device__ __forceinline__ u32 and_of_warp(u32 x) {
    u32 all;
    asm volatile("redux.sync.and.b32 %0, %1, 0xFFFFFFFF;" : "=r"(all) : "r"(x));
    return all;
}

__device__ __forceinline__ u64 add_relaxed(u64* counter) {
    u64 before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ void sync_threads(int id, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Whether it is so for any thread of a warpgroup.
__device__ __forceinline__ bool any_of_warpgroup(bool is, int barrier) {
    u32 any;
    asm volatile(
        "{\n.reg .pred is, any;\nsetp.ne.u32 is, %1, 0;\nbarrier.cta.red.or.aligned.pred any, %2, 128, is;\n"
        "selp.u32 %0, 1, 0, any;\n}\n"
        : "=r"(any)
        : "r"(u32(is)), "r"(barrier)
        : "memory");
    return any;
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

// ---- wgmma --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from reading accumulators before the products that are waited for, which it would serialise then. The
// main loop does without: stay_behind and the wait are volatile, and all that reads o comes after them.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What comes next is not moved before what a sum of weights takes: ptxas waits for products as early as it can, with the
// weights that they should overlap still to come, but does not go past a branch. No addition gives a signalling NaN.
__device__ __forceinline__ void stay_behind(float sum) {
    asm volatile(
        "{\n.reg .pred never;\nagain:\nsetp.eq.u32 never, %0, 0x7F800001;\nvote.sync.any.pred never, never, 0xFFFFFFFF;\n"
        "@never bra again;\n}\n" ::"r"(__float_as_uint(sum))
        : "memory");
}

// A matrix descriptor with 128-byte swizzle. `leading` is the distance of 64-column boxes where columns are contiguous
// (V), `stride` that of eight rows; both in bytes. (PTX ISA, asynchronous warpgroup level matrix operand.)
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
    return (u64(1) << 62) | (u64(stride >> 4) << 32) | (u64(leading >> 4) << 16) | (address >> 4 & 0x3FFF);
}

#if BF16
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif
#define ROW8(d, i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),     \
        "+f"(d[i + 7])
#define ROW32(d, i) ROW8(d, i), ROW8(d, i + 8), ROW8(d, i + 16), ROW8(d, i + 24)
#define D32                                                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "            \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D64                                                                                                           \
    D32                                                                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "          \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D88                                                                                                           \
    D64                                                                                                               \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "          \
    "%84, %85, %86, %87"

// d = a·bᵀ (or d += where `add`): 64 × N, 16 deep; a and b in shared memory, contiguous along the depth.
template <int N>
__device__ __forceinline__ void scores_step(float* d, u64 a, u64 b, int add) {
    if constexpr (N == 64) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" D32 "}, %32, %33, add, 1, 1, 0, 0;\n}\n"
            : ROW32(d, 0)
            : "l"(a), "l"(b), "r"(add));
    } else if constexpr (N == 128) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" D64 "}, %64, %65, add, 1, 1, 0, 0;\n}\n"
            : ROW32(d, 0), ROW32(d, 32)
            : "l"(a), "l"(b), "r"(add));
    } else {
        static_assert(N == 176, "keys of a block");
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %90, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n176k16." TYPES " {" D88 "}, %88, %89, add, 1, 1, 0, 0;\n}\n"
            : ROW32(d, 0), ROW32(d, 32), ROW8(d, 64), ROW8(d, 72), ROW8(d, 80)
            : "l"(a), "l"(b), "r"(add));
    }
}

// The same with a in registers.
template <int N>
__device__ __forceinline__ void scores_step(float* d, const u32* a, u64 b, int add) {
    if constexpr (N == 64) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" D32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
            : ROW32(d, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    } else if constexpr (N == 128) {
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" D64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}\n"
            : ROW32(d, 0), ROW32(d, 32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    } else {
        static_assert(N == 176, "keys of a block");
        asm volatile(
            "{\n.reg .pred add;\nsetp.ne.b32 add, %93, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n176k16." TYPES " {" D88 "}, {%88, %89, %90, %91}, %92, add, 1, 1, 0;\n}\n"
            : ROW32(d, 0), ROW32(d, 32), ROW8(d, 64), ROW8(d, 72), ROW8(d, 80)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
}

// d += a·b: 64 × N, 16 deep; a in registers, b in shared memory, contiguous along N.
template <int N>
__device__ __forceinline__ void values_step(float* d, const u32* a, u64 b) {
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" D32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : ROW32(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" D64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
            : ROW32(d, 0), ROW32(d, 32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}

// ---- the tile -----------------------------------------------------------------------------------------------------

struct Tile {
    int batch, group;        // of PACK query heads
    int query;               // the first
    int column;              // of V: the first
    int pieces;              // of a part, of the rows that there are
    int block, blocks;       // this block's key blocks: the first, and how many
    int whole_lo, whole_hi;  // the keys that all rows of the tile see
};

__device__ __forceinline__ u32 operator/(u32 n, const Divisor& d) { return (__umulhi(n, d.factor) + n) >> d.shift; }

__device__ __forceinline__ int low_key(const Params& p, int position) { return WINDOW ? max(0, position - p.behind) : 0; }
__device__ __forceinline__ int high_key(const Params& p, int position) { return min(p.seqlen_k, position + p.ahead); }

// What follows from the fields before `pieces`.
__device__ __forceinline__ void complete(const Params& p, Tile& tile, u32 rank) {
    const int queries = min(p.seqlen_q - tile.query, QUERIES);
    tile.pieces = (queries * PACK + 7) / 8 * HALF_PIECES;
    int lo = 0, hi = p.seqlen_k;
    tile.whole_lo = 0, tile.whole_hi = p.seqlen_k;
    if (MASKED) {
        const int top = tile.query + p.seqlen_k - p.seqlen_q, bottom = top + queries - 1;
        lo = low_key(p, top), hi = max(lo, high_key(p, bottom));
        tile.whole_lo = low_key(p, bottom), tile.whole_hi = high_key(p, top);
    }
    const int first = lo / KEYS, all = (hi + KEYS - 1) / KEYS - first;
    tile.block = first + all * int(rank) / PARTS;
    tile.blocks = first + all * int(rank + 1) / PARTS - tile.block;
}

// By its number among all of the launch.
__device__ __forceinline__ Tile tile_of(const Params& p, u32 number) {
    Tile tile;
    const u32 work = number / u32(SPLIT_V);
    tile.column = number % SPLIT_V * DV;
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
    complete(p, tile, 0);
    return tile;
}

// Of blocks that all run at once: their order does not matter, and no division is waited for.
__device__ __forceinline__ Tile tile_of_block(const Params& p) {
    Tile tile;
    tile.column = blockIdx.x / PARTS % SPLIT_V * DV;
    tile.query = blockIdx.x / (PARTS * SPLIT_V) * QUERIES;
    tile.group = blockIdx.y, tile.batch = blockIdx.z;
    complete(p, tile, blockIdx.x % PARTS);
    return tile;
}

struct Shared {
    u32 queries, ring, halves, barriers, k_full, k_empty, v_full, v_empty;

    __device__ __forceinline__ explicit Shared(u32 base)
        : queries(base),
          ring(base + Q_BYTES),
          halves(ring + RING_BYTES),
          barriers(halves + HALVES_BYTES),
          k_full(barriers + 40),
          k_empty(k_full + 8 * STAGES),
          v_full(k_empty + 8 * STAGES),
          v_empty(v_full + 8 * STAGES) {}

    // Of a tile's turn among those of its block: the queries, their barriers and the tile's number.
    __device__ __forceinline__ u32 q(int turn) const { return queries + turn % Q_BUFFERS * Q_BUFFER_BYTES; }
    __device__ __forceinline__ u32 q_full(int turn) const { return barriers + turn % Q_BUFFERS * 8; }
    __device__ __forceinline__ u32 q_empty(int turn) const { return barriers + 16 + turn % Q_BUFFERS * 8; }
    __device__ __forceinline__ u32 number(int turn) const { return barriers + 32 + turn % Q_BUFFERS * 4; }

    __device__ __forceinline__ u32 k(int stage) const { return ring + stage * (K_BYTES + V_BYTES); }
    __device__ __forceinline__ u32 v(int stage) const { return k(stage) + K_BYTES; }
};

// Position of an arrival in the ring: block number `index` of those this block loads.
struct Slot {
    int stage;
    u32 parity;

    __device__ __forceinline__ explicit Slot(int index) : stage(index % STAGES), parity(index / STAGES & 1) {}
};

__device__ __forceinline__ void load_queries(const Tile& tile, const Shared& shared, const TensorMap& map, int turn) {
    barrier_expect(shared.q_full(turn), TILE_ROWS * D * 2);
#pragma unroll
    for (int box = 0; box < D / BOX_COLUMNS; ++box) {
        load_box(shared.q(turn) + box * ROWS * BOX_ROW_BYTES, map, shared.q_full(turn), box * BOX_COLUMNS, tile.query,
                 tile.group, tile.batch, 0);
    }
}

// One key block of K or of V, once its place in the ring is free.
template <int COLUMNS>
__device__ __forceinline__ void load_keys(u32 target, const TensorMap& map, u32 full, int column, int key, int head,
                                          int batch) {
    barrier_expect(full, KEYS * COLUMNS * 2);
#pragma unroll
    for (int box = 0; box < COLUMNS / BOX_COLUMNS; ++box) {
        load_box(target + box * KEYS * BOX_ROW_BYTES, map, full, column + box * BOX_COLUMNS, key, head, batch);
    }
}

struct Producer {
    const Params& p;
    const Shared& shared;
    const TensorMap &q_map, &k_map, &v_map;

    // `at` is a key block's number among all that this block of threads loads.
    __device__ __forceinline__ void ask_keys(const Tile& tile, int index, int at) const {
        const Slot slot(at);
        if (at >= STAGES) barrier_wait(shared.k_empty + 8 * slot.stage, slot.parity ^ 1);
        load_keys<D>(shared.k(slot.stage), k_map, shared.k_full + 8 * slot.stage, 0, (tile.block + index) * KEYS,
                     u32(tile.group) / p.key_groups, tile.batch);
    }

    __device__ __forceinline__ void ask_values(const Tile& tile, int index, int at) const {
        const Slot slot(at);
        if (at >= STAGES) barrier_wait(shared.v_empty + 8 * slot.stage, slot.parity ^ 1);
        load_keys<DV>(shared.v(slot.stage), v_map, shared.v_full + 8 * slot.stage, tile.column,
                      (tile.block + index) * KEYS, u32(tile.group) / p.key_groups, tile.batch);
    }

    // What a tile needs before its first product.
    __device__ __forceinline__ void begin(const Tile& tile, int turn, int at) const {
        if (!tile.blocks) return;
        load_queries(tile, shared, q_map, turn);
        ask_keys(tile, 0, at);
    }

    // A tile that no other block takes. Every launch adds tiles_in_all: one for each tile that was taken and one for each
    // block of threads that found none.
    __device__ __forceinline__ u32 take() const { return gridDim.x + u32(add_relaxed(p.taken) % p.tiles_in_all); }

    // Tells the consumers, and asks for what the tile needs first. Whether there is one.
    __device__ __forceinline__ bool go_on(Tile& tile, u32 number, int turn, int at) const {
        if (turn >= Q_BUFFERS) barrier_wait(shared.q_empty(turn), ~(turn / Q_BUFFERS) & 1);
        store_shared(shared.number(turn), number);
        if (number >= p.tiles_in_all) {
            barrier_arrive(shared.q_full(turn));
            return false;
        }
        tile = tile_of(p, number);
        begin(tile, turn, at);
        return true;
    }

    // All but what `begin` asked for of the first tile, and where PERSISTENT of those after it: whoever is free takes the
    // next. The next keys are asked for before a block's values, as their place in the ring is free earlier; only where
    // nothing runs yet, values come first.
    //
    // Of large key blocks not all that the ring holds is asked for at once: what is in flight shares the bandwidth, and
    // comes as late as the last of it. A block's V and the next one's K are asked for when its own K is there. Of small
    // ones that would be too little to hide the latency.
    __device__ __forceinline__ void run(const Tile& first) const {
        Tile tile = first;
        u32 number = 0;
        for (int turn = 0, before = 0;; ++turn) {
            Tile following = tile;
            bool more = false;
            for (int index = 0; index < tile.blocks; ++index) {
                const int at = before + index;
                const Slot slot(at);
                if (KEYS > 64) barrier_wait(shared.k_full + 8 * slot.stage, slot.parity);
                if (at == 0) ask_values(tile, index, at);
                if (index + 1 < tile.blocks) {
                    ask_keys(tile, index + 1, at + 1);
                } else if (PERSISTENT) {
                    if (tile.blocks == 1) number = take();
                    more = go_on(following, number, turn + 1, at + 1);
                }
                if (at > 0) ask_values(tile, index, at);
                // Early enough to be there, and late enough that blocks end together.
                if (PERSISTENT && index + 2 == tile.blocks) number = take();
            }
            if (!more) return;
            before += tile.blocks;
            tile = following;
        }
    }
};

// What one consumer knows of its 64 rows. A thread holds two of them, 8 apart (the layout of wgmma's accumulators):
// o[4c + 2h + e] is row 16·warp + lane/4 + 8h, column 8c + 2·(lane%4) + e, and the same for scores.
struct Softmax {
    // What is subtracted: the greatest score that was looked for so far, times log2(e). It is rounded once and then used for
    // all that is summed up, so that rounding it costs nothing up to LARGEST, where weights are off by a factor of 2⁸ at
    // most, all alike. Beyond it, in any share of a row's keys, the row is NaN.
    float shift[2] = {MINUS_INFINITY, MINUS_INFINITY};
    float sum[2] = {0, 0};  // of this thread's columns
    // Of the last key block: what its weights add up to, and the factors of what was summed up before it.
    float added[2], factor[2];

    // Looks for the greatest of a block's scores.
    __device__ __forceinline__ void raise(const float (&s)[KEYS / 2], float scale) {
        float tops[4] = {s[0], s[1], s[2], s[3]};  // of one chain alone, each maximum would wait for the last
#pragma unroll
        for (int i = 4; i < KEYS / 2; ++i) tops[i % 4] = fmaxf(tops[i % 4], s[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = fmaxf(tops[2 * h], tops[2 * h + 1]);
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
            const float after = fmaxf(shift[h], top * scale);
            factor[h] = exp2_approx(shift[h] - finite(after));
            shift[h] = after;
            sum[h] *= factor[h];
        }
    }

    // Turns scores of columns 8·FIRST to below 8·END into weights exp2(scale · score - less).
    template <int FIRST, int END>
    __device__ __forceinline__ void weigh(float (&s)[KEYS / 2], float scale, const float (&less)[2]) {
        if (FIRST == 0) added[0] = added[1] = 0;
#pragma unroll
        for (int i = 4 * FIRST; i < 4 * END; ++i) {
            const int h = i / 2 % 2;
            s[i] = exp2_approx(s[i] * scale - less[h]);
            added[h] += s[i];
        }
    }

    // By the greatest score so far, or, where it has risen, by that one.
    template <int FIRST, int END>
    __device__ __forceinline__ void weigh(float (&s)[KEYS / 2], float scale) {
        const float less[2] = {finite(shift[0]), finite(shift[1])};
        weigh<FIRST, END>(s, scale, less);
    }

    // Whether all of a block's scores may be weighed by the greatest one so far. Leaves weights where they may. A row that
    // has seen no key yet has weights of +inf or NaN. `first` and `second`: whether the tile has these two rows at all.
    __device__ __forceinline__ bool guess(float (&s)[KEYS / 2], float scale, bool first, bool second) {
        weigh<0, KEYS / 8>(s, scale, shift);
        return (first ? added[0] : 0.0f) + (second ? added[1] : 0.0f) <= MOST_WEIGHT;
    }

    __device__ __forceinline__ void add() { sum[0] += added[0], sum[1] += added[1]; }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
            sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
            if (fabsf(shift[h]) > LARGEST && shift[h] != MINUS_INFINITY) sum[h] = NOT_A_NUMBER;  // and not a wrong one
        }
    }

    // A row that has seen no key has a shift of -inf, and weights of zero.
    __device__ static __forceinline__ float finite(float shift) { return shift == MINUS_INFINITY ? 0.0f : shift; }

    __device__ static __forceinline__ float inverse(float sum, bool blind) {
        return sum != 0 ? inverse_approx(sum) : blind ? 0.0f : NOT_A_NUMBER;  // of scores that are all -inf
    }

    __device__ static __forceinline__ float log_sum(float shift, float sum) {
        constexpr float LN2 = 0.693147180559945309f;
        return sum == 0 ? MINUS_INFINITY : (shift + log2_approx(sum)) * LN2;
    }
};

__device__ __forceinline__ void mask(const Params& p, const int (&position)[2], int key, int lane,
                                     float (&s)[KEYS / 2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        // From the thread's first column on, so that each comparison is with a constant.
        const int first = key + 2 * (lane % 4);
        const int lo = WINDOW ? low_key(p, position[h]) - first : 0;
        const int hi = (MASKED ? high_key(p, position[h]) : p.seqlen_k) - first;
#pragma unroll
        for (int c = 0; c < KEYS / 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if ((WINDOW && 8 * c + e < lo) || 8 * c + e >= hi) s[4 * c + 2 * h + e] = MINUS_INFINITY;
            }
        }
    }
}

// A consumer's queries: in shared memory, where every product reads them again, or in registers, where there are enough.
struct Queries {
    u32 address;
    u32 words[Q_IN_REGISTERS ? D / 4 : 1];

    // `first` is where the consumer's rows begin. Each word of a lane is of one row, two columns (the layout of wgmma's a).
    __device__ __forceinline__ void load(u32 first, int thread) {
        address = first;
        if (!Q_IN_REGISTERS) return;
        const int row = thread / 32 * 16 + thread % 16, half = thread % 32 / 16;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            const u32 at = first + step / 4 * ROWS * BOX_ROW_BYTES + row * BOX_ROW_BYTES;
            const u32 chunk = u32(step % 4 * 2 + half) ^ u32(row % 8);  // of 16 bytes, as the 128-byte swizzle has them
            load_matrices(words + 4 * step, at + chunk * 16);
        }
    }
};

__device__ __forceinline__ void multiply_scores(const Queries& q, u32 k, float (&s)[KEYS / 2]) {
    const u64 a = descriptor(q.address, 16, 1024), b = descriptor(k, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        // Four steps of 32 bytes in each row of a box.
        const u32 box = step / 4, inside = step % 4 * 32;
        const u64 keys = b + ((box * KEYS * BOX_ROW_BYTES + inside) >> 4);
        if constexpr (Q_IN_REGISTERS) {
            scores_step<KEYS>(s, q.words + 4 * step, keys, step > 0);
        } else {
            scores_step<KEYS>(s, a + ((box * ROWS * BOX_ROW_BYTES + inside) >> 4), keys, step > 0);
        }
    }
    wgmma_commit();
}

__device__ __forceinline__ void multiply_values(const u32 (&weights)[KEYS / 4], u32 v, float (&o)[DV / 2]) {
    const u64 b = descriptor(v, KEYS * BOX_ROW_BYTES, 1024);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        const u64 rows = b + ((step * 16 * BOX_ROW_BYTES) >> 4);
#pragma unroll
        for (int column = 0; column < DV; column += 128) {
            const u64 columns = rows + ((column / BOX_COLUMNS * KEYS * BOX_ROW_BYTES) >> 4);
            if (column + 128 <= DV) {
                values_step<128>(o + column / 2, weights + 4 * step, columns);
            } else {
                values_step<64>(o + column / 2, weights + 4 * step, columns);
            }
        }
    }
    wgmma_commit();
}

__device__ __forceinline__ void pack_all(const float (&s)[KEYS / 2], u32 (&weights)[KEYS / 4]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Of two consumers of the same rows, each hands over half of its columns, the first or the second, with m and l.
template <int HALF>
__device__ __forceinline__ void give_half(const Shared& shared, int thread, const float (&o)[DV / 2],
                                          const Softmax& softmax) {
    constexpr int STEP = WARPGROUP * 16, STATE = DV / 16;
    const u32 given = shared.halves + HALF * HALF_BYTES + thread * 16;
#pragma unroll
    for (int i = 0; i < STATE; ++i) {
        const float* const x = o + HALF * DV / 4 + 4 * i;
        store_shared(given + i * STEP, make_float4(x[0], x[1], x[2], x[3]));
    }
    store_shared(given + STATE * STEP,
                 make_float4(softmax.shift[0], softmax.shift[1], softmax.sum[0], softmax.sum[1]));
}

// And adds the other's to the half that it keeps.
template <int HALF>
__device__ __forceinline__ void take_half(const Shared& shared, int thread, float (&o)[DV / 2], Softmax& softmax) {
    constexpr int STEP = WARPGROUP * 16, STATE = DV / 16;
    const u32 taken = shared.halves + HALF * HALF_BYTES + thread * 16;
    const float4 state = load_shared_four(taken + STATE * STEP);
    const float other[2] = {state.x, state.y}, other_sum[2] = {state.z, state.w};
    float factor[2], other_factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float after = fmaxf(softmax.shift[h], other[h]), finite = Softmax::finite(after);
        factor[h] = exp2_approx(softmax.shift[h] - finite);
        other_factor[h] = exp2_approx(other[h] - finite);
        softmax.shift[h] = after;
        softmax.sum[h] = softmax.sum[h] * factor[h] + other_sum[h] * other_factor[h];
    }
#pragma unroll
    for (int i = 0; i < STATE; ++i) {
        const float4 x = load_shared_four(taken + i * STEP);
        const float theirs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float& mine = o[HALF * DV / 4 + 4 * i + j];
            mine = mine * factor[j / 2] + theirs[j] * other_factor[j / 2];
        }
    }
}

// ---- the output ---------------------------------------------------------------------------------------------------

struct Row {
    i64 index;  // of (batch, heads_q, seqlen_q)
    bool valid, blind;  // there is such a row, and it sees no key
};

__device__ __forceinline__ Row out_row(const Params& p, const Tile& tile, u32 row) {
    const int query = tile.query + int(row / PACK), position = query + p.seqlen_k - p.seqlen_q;
    const u32 head = (tile.batch * p.groups.value + tile.group) * PACK + row % PACK;
    return {i64(head) * p.seqlen_q + query, row < TILE_ROWS && query < p.seqlen_q,
            MASKED && low_key(p, position) >= high_key(p, position)};
}

// Four words of each of four lanes next to each other: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void transpose(u32 (&w)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int low = 0; low < 4; ++low) {
            if (low & bit) continue;
            u32 &kept = w[low], &given = w[low | bit];
            const bool odd = lane & bit;
            const u32 other = __shfl_xor_sync(0xFFFFFFFFu, odd ? kept : given, bit);
            if (odd) {
                kept = other;
            } else {
                given = other;
            }
        }
    }
}

// Row `h` of the two that a thread holds.
__device__ __forceinline__ Row own_row(const Params& p, const Tile& tile, int consumer, int thread, int h) {
    return out_row(p, tile, 64 * (consumer / SHARED_ROWS) + thread / 32 * 16 + thread % 32 / 4 + 8 * h);
}

// Of a tile of one part: writes the log-sum-exp, and gives what the output is multiplied by.
__device__ __forceinline__ void write_sums(const Params& p, const Tile& tile, int consumer, int thread,
                                           const Softmax& softmax, float (&inverse)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Row place = own_row(p, tile, consumer, thread, h);
        inverse[h] = Softmax::inverse(softmax.sum[h], place.blind);
        if (p.lse && thread % 4 == 0 && tile.column == 0 && consumer % SHARED_ROWS == 0 && place.valid) {
            p.lse[place.index] = Softmax::log_sum(softmax.shift[h], softmax.sum[h]);
        }
    }
}

// A tile of one part, from registers, columns 8·FIRST to below 8·END: each lane has 16 bytes of a row after its four have
// exchanged theirs.
template <int FIRST, int END>
__device__ __forceinline__ void write_rows(const Params& p, const Tile& tile, int consumer, int thread,
                                           const float (&o)[DV / 2], const float (&inverse)[2]) {
    const int lane = thread % 32;
    uint4* const out = static_cast<uint4*>(p.out);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Row place = own_row(p, tile, consumer, thread, h);
#pragma unroll
        for (int c = FIRST; c < END; c += 4) {
            u32 w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 4 * (c + i) + 2 * h;
                w[i] = pack(o[at] * inverse[h], o[at + 1] * inverse[h]);
            }
            transpose(w, lane);
            const int column = tile.column + 8 * (c + lane % 4);
            if (place.valid && column < p.head_dim_v) {
                out[(place.index * p.head_dim_v + column) / 8] = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

// ---- attention of a tile ------------------------------------------------------------------------------------------

// The consumer's rows on the block's key blocks, or on every other one. Where PERSISTENT, it goes on to the tiles that the
// producer takes, and writes all but the last.
__device__ __forceinline__ void attend(const Params& p, Tile& tile, const Shared& shared, int consumer, int thread,
                                       float (&o)[DV / 2], Softmax& softmax) {
    const int first_row = 64 * (consumer / SHARED_ROWS), lane = thread % 32;
    int index = consumer % SHARED_ROWS;
    if (index >= tile.blocks) return;

    float s[KEYS / 2];
    u32 weights[KEYS / 4];
    Queries queries;
    const auto masked = [&](const Tile& tile, int index) {
        const int key = (tile.block + index) * KEYS;
        if (key >= tile.whole_lo && key + KEYS <= tile.whole_hi) return;
        int position[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 row = first_row + thread / 32 * 16 + lane / 4 + 8 * h;
            position[h] = tile.query + int(row / PACK) + p.seqlen_k - p.seqlen_q;
        }
        mask(p, position, key, lane, s);
    };
    const auto free_slot = [&](u32 barrier) {
        if (thread == 0) barrier_arrive(barrier);
    };
    const auto rescale = [&] {
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[i] *= softmax.factor[i / 2 % 2];
    };
    barrier_wait(shared.q_full(0), 0);
    queries.load(shared.q(0) + first_row * BOX_ROW_BYTES, thread);
    {
        const Slot slot(index);
        barrier_wait(shared.k_full + 8 * slot.stage, slot.parity);
        multiply_scores(queries, shared.k(slot.stage), s);
        wgmma_wait<0>();
        if (Q_IN_REGISTERS && lane == 0) barrier_arrive(shared.q_empty(0));
        free_slot(shared.k_empty + 8 * slot.stage);
        masked(tile, index);
        softmax.raise(s, p.scale_log2);
        softmax.weigh<0, KEYS / 8>(s, p.scale_log2);
        softmax.add();
        pack_all(s, weights);
    }
    int before = 0;  // key blocks of earlier tiles
    for (int turn = 0;; ++turn) {
        for (; index + SHARED_ROWS < tile.blocks; index += SHARED_ROWS) {
            const Slot slot(before + index), next(before + index + SHARED_ROWS);
            barrier_wait(shared.k_full + 8 * next.stage, next.parity);
            multiply_scores(queries, shared.k(next.stage), s);
            barrier_wait(shared.v_full + 8 * slot.stage, slot.parity);
            multiply_values(weights, shared.v(slot.stage), o);
            wgmma_wait<1>();
            if (GUESSED) {
                masked(tile, index + SHARED_ROWS);
                const int row = first_row + thread / 32 * 16 + lane / 4;
                const bool right = softmax.guess(s, p.scale_log2, ROWS == TILE_ROWS || row < TILE_ROWS,
                                                 ROWS == TILE_ROWS || row + 8 < TILE_ROWS);
                const bool wrong = any_of_warpgroup(!right, 4 + consumer);
                wgmma_wait<0>();
                if (wrong) {
                    settle(o);
                    multiply_scores(queries, shared.k(next.stage), s);
                    wgmma_wait<0>();
                    settle(s);
                    masked(tile, index + SHARED_ROWS);
                    softmax.raise(s, p.scale_log2);
                    softmax.weigh<0, KEYS / 8>(s, p.scale_log2);
                    rescale();
                }
                __syncwarp();  // tells the compiler that the warp is whole: it keeps descriptors in uniform registers then
                free_slot(shared.k_empty + 8 * next.stage);
            } else {
                free_slot(shared.k_empty + 8 * next.stage);
                masked(tile, index + SHARED_ROWS);
                softmax.raise(s, p.scale_log2);
                softmax.weigh<0, EARLY>(s, p.scale_log2);
                stay_behind(softmax.added[0] + softmax.added[1]);
                wgmma_wait<0>();
                rescale();
                softmax.weigh<EARLY, KEYS / 8>(s, p.scale_log2);
            }
            free_slot(shared.v_empty + 8 * slot.stage);
            softmax.add();
            pack_all(s, weights);
        }
        if (!PERSISTENT) break;
        barrier_wait(shared.q_full(turn + 1), (turn + 1) / Q_BUFFERS & 1);
        // Read by the lane that tells of it, through q_empty, when the next one may be written.
        const u32 read = lane == 0 ? load_shared(shared.number(turn + 1)) : 0;
        const u32 number = __shfl_sync(0xFFFFFFFFu, read, 0);
        if (number >= p.tiles_in_all) break;

        // The first scores of the next tile together with the last values of this one, so that the tensor cores do not
        // wait for a softmax between tiles either.
        const Tile following = tile_of(p, number);
        before += tile.blocks;
        const Slot slot(before - 1), next(before);
        barrier_wait(shared.k_full + 8 * next.stage, next.parity);
        queries.load(shared.q(turn + 1) + first_row * BOX_ROW_BYTES, thread);
        multiply_scores(queries, shared.k(next.stage), s);
        barrier_wait(shared.v_full + 8 * slot.stage, slot.parity);
        multiply_values(weights, shared.v(slot.stage), o);
        if (lane == 0) barrier_arrive(shared.q_empty(turn + Q_IN_REGISTERS));
        float inverse[2];
        softmax.finish();
        write_sums(p, tile, consumer, thread, softmax, inverse);
        softmax = Softmax();
        __syncwarp();
        wgmma_wait<1>();
        free_slot(shared.k_empty + 8 * next.stage);
        masked(following, 0);
        softmax.raise(s, p.scale_log2);
        softmax.weigh<0, KEYS / 8>(s, p.scale_log2);
        stay_behind(softmax.added[0] + softmax.added[1]);
        wgmma_wait<0>();
        free_slot(shared.v_empty + 8 * slot.stage);
        settle(o);
        softmax.add();
        pack_all(s, weights);
        write_rows<0, CHUNKS>(p, tile, consumer, thread, o, inverse);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[i] = 0;
        tile = following;
        index = 0;
    }
    const Slot slot(before + index);
    barrier_wait(shared.v_full + 8 * slot.stage, slot.parity);
    multiply_values(weights, shared.v(slot.stage), o);
    wgmma_wait<0>();
    settle(o);
}

// ---- parts --------------------------------------------------------------------------------------------------------

// A part, and the launch that it is of.
struct Part {
    unsigned char* base;
    u32 launch;

    __device__ __forceinline__ void* piece(int number, int lane) const {
        return base + number * PIECE_BYTES + lane * 16;
    }
    __device__ __forceinline__ void* state(int row) const { return base + TILE_PIECES * PIECE_BYTES + row * STATE_BYTES; }
};

// This thread's share of columns 16·FIRST to below 16·END, and of the states if these are the first.
template <int FIRST, int END>
__device__ __forceinline__ void store_part(const Part& part, const Tile& tile, int warp, int lane,
                                           const float (&o)[DV / 2], const Softmax& softmax) {
    if (FIRST == 0 && lane % 4 < 2) {
        const int h = lane % 4;
        const float shift = h ? softmax.shift[1] : softmax.shift[0], sum = h ? softmax.sum[1] : softmax.sum[0];
        store_relaxed(part.state(warp * 16 + lane / 4 + 8 * h),
                      make_uint4(__float_as_uint(shift), __float_as_uint(sum), part.launch, 0));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int first = warp * WARP_PIECES + h * HALF_PIECES;
        if (first >= tile.pieces) continue;  // of rows that there are not
#pragma unroll
        for (int j = FIRST; j < END; ++j) {
            const float *const low = o + 8 * j + 2 * h, *const high = low + 4;
            const u32 last = __byte_perm(__float_as_uint(high[1]), part.launch, 0x3214);
            store_relaxed(part.piece(first + j, lane), make_uint4(__float_as_uint(low[0]), __float_as_uint(low[1]),
                                                                  __float_as_uint(high[0]), last));
        }
    }
}

// What a lane adds up: its four floats of a piece, in one row.
struct Sum {
    float shift = MINUS_INFINITY, sum = 0;
    float4 total = make_float4(0, 0, 0, 0);

    // What others have: their floats, and m and l of the row.
    template <int N>
    __device__ __forceinline__ void add(const float4 (&others)[N], const float2 (&state)[N]) {
        float after = shift;
#pragma unroll
        for (int i = 0; i < N; ++i) after = fmaxf(after, state[i].x);
        const float finite = Softmax::finite(after), factor = exp2_approx(shift - finite);
        shift = after, sum *= factor;
        total.x *= factor, total.y *= factor, total.z *= factor, total.w *= factor;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float weight = exp2_approx(state[i].x - finite);
            const float4 x = others[i];
            sum += state[i].y * weight;
            total.x += x.x * weight, total.y += x.y * weight, total.z += x.z * weight, total.w += x.w * weight;
        }
    }

    __device__ __forceinline__ void write(const Params& p, const Tile& tile, int piece, int lane) const {
        const int rows = piece / HALF_PIECES * 8, first = tile.column + piece % HALF_PIECES * 16 + lane % 4 * 2;
        const Row place = out_row(p, tile, rows + lane / 4);
        if (!place.valid) return;
        const float inverse = Softmax::inverse(sum, place.blind);
        u32* const out = static_cast<u32*>(p.out);
        const u32 both[2] = {pack(total.x * inverse, total.y * inverse), pack(total.z * inverse, total.w * inverse)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = first + 8 * i;
            if (column < p.head_dim_v) out[(place.index * p.head_dim_v + column) / 2] = both[i];
        }
        if (p.lse && first == 0) p.lse[place.index] = Softmax::log_sum(shift, sum);
    }
};

// Adds up pieces `first` to below `end` of a tile's parts, and writes them. Where several warps share a piece, each helper
// takes some of the parts.
__device__ __forceinline__ void add_parts(const Params& p, const Tile& tile, const Shared& shared, int first, int end,
                                          int thread, const Part& first_part) {
    // As much is asked for at once as there are registers for. To ask for states alone until they are there was slower.
    constexpr int SHARE = (PARTS + PIECE_WARPS - 1) / PIECE_WARPS, ROUNDS = (SHARE + 15) / 16;
    constexpr int BATCH = (SHARE + ROUNDS - 1) / ROUNDS, SLOTS = CONSUMER_WARPS / PIECE_WARPS;
    constexpr int TURNS = (SLICE_PIECES + SLOTS - 1) / SLOTS, TOGETHER = TURNS < 16 / BATCH ? TURNS : 16 / BATCH;
    constexpr u32 ALL = (1ull << BATCH) - 1;
    const int warp = thread / 32, lane = thread % 32, slot = warp / PIECE_WARPS, helper = warp % PIECE_WARPS;
    const int from = PARTS * helper / PIECE_WARPS, to = PARTS * (helper + 1) / PIECE_WARPS;
    for (int piece = first + slot * TOGETHER; piece < end; piece += SLOTS * TOGETHER) {
        Sum sums[TOGETHER];
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            uint4 words[TOGETHER][BATCH], states[TOGETHER][BATCH];
            const int begin = from + round * BATCH;
            const auto ask = [&](u32 which) {
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    if (!(which >> i & 1)) continue;
#pragma unroll
                    for (int j = 0; j < TOGETHER; ++j) {
                        const Part part{first_part.base + min(begin + i, PARTS - 1) * PART_BYTES, first_part.launch};
                        const int at = min(piece + j, end - 1);
                        words[j][i] = load_relaxed(part.piece(at, lane));
                        states[j][i] = load_relaxed(part.state(at / HALF_PIECES * 8 + lane / 4));
                    }
                }
            };
            const auto there = [&] {  // a bit for each part whose words are all of this launch
                u32 found = 0;
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    u32 differs = 0;
#pragma unroll
                    for (int j = 0; j < TOGETHER; ++j) {
                        differs |= ((words[j][i].w ^ first_part.launch) & 0xFF) | (states[j][i].z ^ first_part.launch);
                    }
                    found |= u32(differs == 0) << i;
                }
                return and_of_warp(found);
            };
            for (u32 missing = ALL; missing;) {
                ask(missing);
                missing = ~there() & ALL;
            }
            float4 others[BATCH];
            float2 state[BATCH];
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const uint4 x = words[j][i], y = states[j][i];
                    others[i] = make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                                            __uint_as_float(x.w & 0xFFFFFF00u));
                    state[i] = make_float2(__uint_as_float(y.x), __uint_as_float(y.y));
                    if (begin + i >= to) {  // another helper's; not even with a weight of zero, as it may be infinite
                        others[i] = make_float4(0, 0, 0, 0), state[i] = make_float2(MINUS_INFINITY, 0);
                    }
                }
                sums[j].add(others, state);
            }
        }
        if (PIECE_WARPS > 1) {  // one piece for each warp: there is no other round
            const u32 mine = shared.ring + thread * 32;
            if (helper > 0) {
                store_shared(mine, sums[0].total);
                store_shared(mine + 16, make_float4(sums[0].shift, sums[0].sum, 0, 0));
            }
            sync_threads(2 + slot, PIECE_WARPS * 32);
            if (helper > 0) return;
            constexpr int HELPERS = PIECE_WARPS > 1 ? PIECE_WARPS - 1 : 1;
            float4 others[HELPERS];
            float2 state[HELPERS];
#pragma unroll
            for (int i = 0; i < HELPERS; ++i) {
                const u32 theirs = mine + (i + 1) * 32 * 32;
                others[i] = load_shared_four(theirs);
                const float4 x = load_shared_four(theirs + 16);
                state[i] = make_float2(x.x, x.y);
            }
            sums[0].add(others, state);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
            if (piece + j < end) sums[j].write(p, tile, piece + j, lane);
        }
    }
}

// What came of a block's keys, columns 16·FIRST to below 16·END: to where all parts of the tile are, or, of the only one, to the
// output.
template <int FIRST, int END>
__device__ __forceinline__ void deliver(const Params& p, const Tile& tile, const Part& part, int consumer, int thread,
                                        const float (&o)[DV / 2], const Softmax& softmax) {
    if (PARTS > 1) {
        store_part<FIRST, END>(part, tile, 4 * (consumer / SHARED_ROWS) + thread / 32, thread % 32, o, softmax);
    } else {
        float inverse[2];
        write_sums(p, tile, consumer, thread, softmax, inverse);
        write_rows<2 * FIRST, 2 * END>(p, tile, consumer, thread, o, inverse);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared(shared_address(memory));
    Tile tile = PARTS > 1 ? tile_of_block(p) : tile_of(p, blockIdx.x);
    const int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;

    // Three warps at once, as the first products wait for it.
    const Producer producer{p, shared, q_map, k_map, v_map};
    if (threadIdx.x < 32) {
        if (elect()) {
            barrier_init(shared.q_full(0), 1);
            fence_barriers();
            if (tile.blocks) load_queries(tile, shared, q_map, 0);
        }
        __syncwarp();
    } else if (threadIdx.x < 64) {
        if (elect()) {
            barrier_init(shared.k_full, 1);
            fence_barriers();
            if (tile.blocks) producer.ask_keys(tile, 0, 0);
        }
        __syncwarp();
    } else if (threadIdx.x == 64) {
        prefetch(v_map);
#pragma unroll
        for (int buffer = 0; buffer < Q_BUFFERS; ++buffer) {
            if (buffer) barrier_init(shared.q_full(buffer), 1);
            barrier_init(shared.q_empty(buffer), CONSUMER_THREADS / 32);
        }
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            if (stage) barrier_init(shared.k_full + 8 * stage, 1);
            barrier_init(shared.v_full + 8 * stage, 1);
            barrier_init(shared.k_empty + 8 * stage, CONSUMERS / SHARED_ROWS);
            barrier_init(shared.v_empty + 8 * stage, CONSUMERS / SHARED_ROWS);
        }
        fence_barriers();
    }
    // The number of this launch; 0 is what memory holds before the first. None but this block counts its launches.
    const u32 number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const u32 launch = PARTS > 1 ? p.launches[number] + 1 : 0;
    __syncthreads();

    if (warpgroup == 0) {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (thread == 0) producer.run(tile);
        if (PARTS > 1 && thread == 32) p.launches[number] = launch;
    } else {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int consumer = warpgroup - 1;
        float o[DV / 2];
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[i] = 0;
        Softmax softmax;
        attend(p, tile, shared, consumer, thread, o, softmax);
        softmax.finish();
        const Part first{p.parts + u64(number / PARTS) * PARTS * PART_BYTES, launch};
        const Part own{first.base + number % PARTS * PART_BYTES, launch};
        if constexpr (SHARED_ROWS == 1) {
            deliver<0, HALF_PIECES>(p, tile, own, consumer, thread, o, softmax);
        } else {
            if (consumer == 0) {
                give_half<1>(shared, thread, o, softmax);
            } else {
                give_half<0>(shared, thread, o, softmax);
            }
            sync_threads(1, CONSUMER_THREADS);
            if (consumer == 0) {
                take_half<0>(shared, thread, o, softmax);
                deliver<0, HALF_PIECES / 2>(p, tile, own, consumer, thread, o, softmax);
            } else {
                take_half<1>(shared, thread, o, softmax);
                deliver<HALF_PIECES / 2, HALF_PIECES>(p, tile, own, consumer, thread, o, softmax);
            }
        }
        if (PARTS > 1) {
            // The ring, where warps meet, has been read by all.
            if (PIECE_WARPS > 1 && SHARED_ROWS == 1) sync_threads(1, CONSUMER_THREADS);
            const u32 rank = number % PARTS;
            add_parts(p, tile, shared, tile.pieces * rank / PARTS, tile.pieces * (rank + 1) / PARTS,
                      threadIdx.x - WARPGROUP, first);
        }
    }
}
