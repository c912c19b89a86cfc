// Forward flash attention for Hopper (sm_90a): TMA feeds wgmma, warps are specialised, keys are split inside a cluster.
//
// One block owns a tile of up to ROWS rows of one key head: queries of PACK query heads that share it, a query's heads
// next to each other, and DV columns of V. A cluster of CLUSTER blocks owns the same tile, each block a share of the key
// blocks that it sees:
//
//     producer        Q K0 V0 K1 V1 K2 V2 …        one thread: TMA into a ring of STAGES, as far as the ring is free
//     consumer 0      QK0 · softmax0 · [QK1 PV0] · softmax1 · [QK2 PV1] · softmax2 …
//     consumer 1      the same on 64 rows more, where ROWS is 128; or, where SHARED_ROWS is 2, on every other key block
//                     of the same rows, and consumer 0 takes over what came of it
//
// […] are issued together: the tensor cores work on PV of one block and QK of the next while the softmax of the latter
// waits for its scores alone. Then, if CLUSTER > 1:
//
//     every block     O, m and l, unnormalised, to its shared memory, and from there to the block of the cluster that adds
//                     up the row, by bulk copies that count bytes on the receiver's barrier
//     every block     adds its 1/CLUSTER of the rows over all parts, in the order of the parts, and writes them
//
// So the sum runs in parallel over the cluster, in one launch, needs no workspace and gives the same bits every time.
//
// Shared memory, from a base aligned to 1024 bytes (128-byte swizzle, as TMA writes it and wgmma reads it):
//
//     Q        max(D, DV)/64 boxes of ROWS × 128 bytes: the output's 16-bit rows pass through here where there is one part
//     ring     STAGES × (K: D/64 boxes of KEYS × 128 bytes, V: DV/64 of them)
//     received CLUSTER × SLICE rows of DV + 4 floats: O, m, l. Where there is no room for it apart (see APART), it lies
//              over Q and the ring, which then must have been read by the whole cluster before anybody sends
//     merged   where SHARED_ROWS is 2, O, m and l of consumer 1, thread by thread
//     staged   ROWS rows of DV + 4 floats, over the ring or, where that is not apart, behind received
//     barriers q_full, received, k_full, k_empty, v_full, v_empty [STAGES]
//
// The source compiles for one configuration, given as macros:
//     D       head size of Q and K, rounded up to 64; TMA fills the rest with zeros
//     DV      columns of V that a block works on: a multiple of 64
//     SPLIT_V blocks that work on the same queries and keys, each with columns of its own
//     BF16    0: fp16, 1: bf16
//     ROWS    64 or 128
//     SHARED_ROWS  consumers that work on the same rows: 1, or 2 where ROWS is 64
//     KEYS    keys of a block: 64 or 128
//     STAGES  of the ring
//     CLUSTER 1 to 16
//     PACK    query heads of a tile; a divisor of those that share a key head
//     MASKED  1: causal or window
// No header is included, so that NVRTC compiles it without a CUDA toolkit.

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define MINUS_INFINITY __int_as_float(0xFF800000)

constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = ROWS / 64 * SHARED_ROWS;
constexpr int CONSUMER_THREADS = CONSUMERS * WARPGROUP;
constexpr int THREADS = CONSUMER_THREADS + WARPGROUP;
constexpr int CLUSTER = OVER_L2 ? 1 : PARTS;
constexpr int SLICE = (ROWS + CLUSTER - 1) / CLUSTER;  // rows that one block of the cluster adds up; the last ones fewer
constexpr int PART_ROW = DV + 4;      // floats, of which the last two are nobody's: rows start in different banks
constexpr int QUERIES = ROWS / PACK;  // of a tile
constexpr int BOX_COLUMNS = 64;       // of 2 bytes: the 128 bytes of a swizzled row
constexpr int BOX_ROW_BYTES = 128;
constexpr u32 OUT_BOXES = (D > DV ? D : DV) / BOX_COLUMNS;
constexpr u32 Q_BYTES = ROWS * OUT_BOXES * BOX_ROW_BYTES;
constexpr u32 K_BYTES = KEYS * D * 2, V_BYTES = KEYS * DV * 2;
constexpr u32 RING_BYTES = STAGES * (K_BYTES + V_BYTES);
constexpr u32 STAGED_BYTES = CLUSTER > 1 ? ROWS * PART_ROW * 4 : 0;
constexpr u32 RECEIVED_BYTES = CLUSTER > 1 ? CLUSTER * SLICE * PART_ROW * 4 : 0;
constexpr u32 BARRIER_BYTES = 8 * (2 + 4 * STAGES);
constexpr u32 MERGED_BYTES = SHARED_ROWS > 1 ? (DV / 2 + 4) * WARPGROUP * 4 : 0;
constexpr bool APART =
    Q_BYTES + RING_BYTES + MERGED_BYTES + RECEIVED_BYTES + BARRIER_BYTES <= 227 * 1024;  // of a block on sm_90
static_assert(SHARED_ROWS == 1 || (ROWS == 64 && STAGES % 2 == 0), "a stage belongs to one of two consumers");
static_assert(STAGED_BYTES + (APART ? 0 : RECEIVED_BYTES) <= RING_BYTES + (APART ? 0 : Q_BYTES), "no room for the parts");

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
    u32* parts;          // where OVER_L2, for what the blocks of a tile tell each other: see publish
    u64* arrivals;       // one for every tile; grows by ARRIVALS a launch
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

__device__ __forceinline__ u32 in_block(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

// Both `target` and `barrier` are addresses in another block of the cluster.
__device__ __forceinline__ void send(u32 target, u32 source, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "r"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// Orders nothing: what the barriers of a cluster tell here is who is ready to receive, and who has received.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What was stored to shared memory is seen by bulk copies.
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float load_shared(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void sync_threads(int id, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
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

// Keeps the compiler from reading accumulators before the products that are waited for: it would have to serialise them.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
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
    int block, blocks;       // this block's key blocks: the first, and how many
    int whole_lo, whole_hi;  // the keys that all rows of the tile see
};

__device__ __forceinline__ u32 operator/(u32 n, const Divisor& d) { return (__umulhi(n, d.factor) + n) >> d.shift; }

__device__ __forceinline__ int low_key(const Params& p, int position) { return max(0, position - p.behind); }
__device__ __forceinline__ int high_key(const Params& p, int position) { return min(p.seqlen_k, position + p.ahead); }

__device__ __forceinline__ Tile tile_of(const Params& p, u32 rank) {
    Tile tile;
    const u32 work = blockIdx.x / (PARTS * SPLIT_V);
    tile.column = blockIdx.x / PARTS % SPLIT_V * DV;
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
    int lo = 0, hi = p.seqlen_k;
    tile.whole_lo = 0, tile.whole_hi = p.seqlen_k;
    if (MASKED) {
        const int top = tile.query + p.seqlen_k - p.seqlen_q;
        const int bottom = min(p.seqlen_q, tile.query + QUERIES) - 1 + p.seqlen_k - p.seqlen_q;
        lo = low_key(p, top), hi = max(lo, high_key(p, bottom));
        tile.whole_lo = low_key(p, bottom), tile.whole_hi = high_key(p, top);
    }
    const int first = lo / KEYS, all = (hi + KEYS - 1) / KEYS - first;
    tile.block = first + all * int(rank) / PARTS;
    tile.blocks = first + all * int(rank + 1) / PARTS - tile.block;
    return tile;
}

struct Shared {
    u32 q, ring, merged, received, staged, q_full, all_received, k_full, k_empty, v_full, v_empty;

    __device__ __forceinline__ explicit Shared(u32 base)
        : q(base),
          ring(q + Q_BYTES),
          merged(ring + RING_BYTES),
          received(APART ? merged + MERGED_BYTES : base),
          staged(APART ? ring : base + RECEIVED_BYTES),
          q_full(merged + MERGED_BYTES + (APART ? RECEIVED_BYTES : 0)),
          all_received(q_full + 8),
          k_full(all_received + 8),
          k_empty(k_full + 8 * STAGES),
          v_full(k_empty + 8 * STAGES),
          v_empty(v_full + 8 * STAGES) {}

    __device__ __forceinline__ u32 k(int stage) const { return ring + stage * (K_BYTES + V_BYTES); }
    __device__ __forceinline__ u32 v(int stage) const { return k(stage) + K_BYTES; }
};

// Position of an arrival in the ring: block number `index` of those this block loads.
struct Slot {
    int stage;
    u32 parity;

    __device__ __forceinline__ explicit Slot(int index) : stage(index % STAGES), parity(index / STAGES & 1) {}
};

__device__ __forceinline__ void load_queries(const Tile& tile, const Shared& shared, const TensorMap& map) {
    barrier_expect(shared.q_full, QUERIES * PACK * D * 2);
#pragma unroll
    for (int box = 0; box < D / BOX_COLUMNS; ++box) {
        load_box(shared.q + box * ROWS * BOX_ROW_BYTES, map, shared.q_full, box * BOX_COLUMNS, tile.query, tile.group,
                 tile.batch, 0);
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

// Not all that the ring holds is asked for at once: what is in flight shares the bandwidth, and comes as late as the
// last of it. A key block's V and the next one's K are asked for when its own K is there.
__device__ __forceinline__ void produce(const Params& p, const Tile& tile, const Shared& shared, const TensorMap& k_map,
                                        const TensorMap& v_map) {
    const int head = u32(tile.group) / p.key_groups;
    for (int index = -1; index < tile.blocks; ++index) {
        if (index >= 0) {
            const Slot slot(index);
            barrier_wait(shared.k_full + 8 * slot.stage, slot.parity);
            if (index >= STAGES) barrier_wait(shared.v_empty + 8 * slot.stage, slot.parity ^ 1);
            load_keys<DV>(shared.v(slot.stage), v_map, shared.v_full + 8 * slot.stage, tile.column,
                          (tile.block + index) * KEYS, head, tile.batch);
        }
        if (index + 1 < tile.blocks) {
            const Slot next(index + 1);
            if (index + 1 >= STAGES) barrier_wait(shared.k_empty + 8 * next.stage, next.parity ^ 1);
            load_keys<D>(shared.k(next.stage), k_map, shared.k_full + 8 * next.stage, 0,
                         (tile.block + index + 1) * KEYS, head, tile.batch);
        }
    }
}

// Address of 16-byte chunk `chunk` of row `row` in boxes of `rows` rows.
__device__ __forceinline__ u32 swizzled(u32 base, int rows, int row, int chunk) {
    return base + (chunk / 8 * rows + row) * BOX_ROW_BYTES + ((chunk % 8) ^ (row % 8)) * 16;
}

// What one consumer knows of its 64 rows. A thread holds two of them, 8 apart (the layout of wgmma's accumulators):
// o[4c + 2h + e] is row 16·warp + lane/4 + 8h, column 8c + 2·(lane%4) + e, and the same for scores.
struct Softmax {
    float max_score[2] = {MINUS_INFINITY, MINUS_INFINITY};  // of the scores as they are, not scaled
    float sum[2] = {0, 0};                                  // of this thread's columns

    // Turns scores into exp2(scale · (score - max)), and gives the factors for what was summed up before.
    __device__ __forceinline__ void update(float (&s)[KEYS / 2], float scale, float (&factor)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = max_score[h];
#pragma unroll
            for (int c = 0; c < KEYS / 8; ++c) top = fmaxf(top, fmaxf(s[4 * c + 2 * h], s[4 * c + 2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
            const float shift = top == MINUS_INFINITY ? 0.0f : top * scale;  // a row that has seen no key stays at 0
            factor[h] = exp2_approx(max_score[h] * scale - shift);
            max_score[h] = top;
            float added = 0;
#pragma unroll
            for (int c = 0; c < KEYS / 8; ++c) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s[4 * c + 2 * h + e];
                    x = exp2_approx(x * scale - shift);
                    added += x;
                }
            }
            sum[h] = sum[h] * factor[h] + added;
        }
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 1);
            sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], 2);
        }
    }
};

__device__ __forceinline__ void mask(const Params& p, const int (&position)[2], int key, int lane,
                                     float (&s)[KEYS / 2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int lo = MASKED ? low_key(p, position[h]) : 0, hi = MASKED ? high_key(p, position[h]) : p.seqlen_k;
#pragma unroll
        for (int c = 0; c < KEYS / 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int at = key + 8 * c + 2 * (lane % 4) + e;
                if (at < lo || at >= hi) s[4 * c + 2 * h + e] = MINUS_INFINITY;
            }
        }
    }
}

__device__ __forceinline__ void multiply_scores(u32 q, u32 k, float (&s)[KEYS / 2]) {
    const u64 a = descriptor(q, 16, 1024), b = descriptor(k, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        // Four steps of 32 bytes in each row of a box.
        const u32 box = step / 4, inside = step % 4 * 32;
        scores_step<KEYS>(s, a + ((box * ROWS * BOX_ROW_BYTES + inside) >> 4),
                          b + ((box * KEYS * BOX_ROW_BYTES + inside) >> 4), step > 0);
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

// The consumer's rows on the block's key blocks, or on every other one.
__device__ __forceinline__ void attend(const Params& p, const Tile& tile, const Shared& shared, int consumer,
                                       int thread, float (&o)[DV / 2], Softmax& softmax) {
    const int first_row = 64 * (consumer / SHARED_ROWS), lane = thread % 32;
    int index = consumer % SHARED_ROWS;
    const u32 q = shared.q + first_row * BOX_ROW_BYTES;
    int position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 row = first_row + thread / 32 * 16 + lane / 4 + 8 * h;
        position[h] = tile.query + int(row / PACK) + p.seqlen_k - p.seqlen_q;
    }
    float s[KEYS / 2], factor[2];
    u32 weights[KEYS / 4];
    if (index >= tile.blocks) return;

    const auto masked = [&](int index) {
        const int key = (tile.block + index) * KEYS;
        if (key < tile.whole_lo || key + KEYS > tile.whole_hi) mask(p, position, key, lane, s);
    };
    barrier_wait(shared.q_full, 0);
    {
        const Slot slot(index);
        barrier_wait(shared.k_full + 8 * slot.stage, slot.parity);
        multiply_scores(q, shared.k(slot.stage), s);
        wgmma_wait<0>();
        if (thread == 0) barrier_arrive(shared.k_empty + 8 * slot.stage);
        masked(index);
        softmax.update(s, p.scale_log2, factor);
        pack_all(s, weights);
    }
    for (; index + SHARED_ROWS < tile.blocks; index += SHARED_ROWS) {
        const Slot slot(index), next(index + SHARED_ROWS);
        barrier_wait(shared.k_full + 8 * next.stage, next.parity);
        multiply_scores(q, shared.k(next.stage), s);
        barrier_wait(shared.v_full + 8 * slot.stage, slot.parity);
        multiply_values(weights, shared.v(slot.stage), o);
        wgmma_wait<1>();
        if (thread == 0) barrier_arrive(shared.k_empty + 8 * next.stage);
        masked(index + SHARED_ROWS);
        softmax.update(s, p.scale_log2, factor);
        wgmma_wait<0>();
        if (thread == 0) barrier_arrive(shared.v_empty + 8 * slot.stage);
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[i] *= factor[i / 2 % 2];
        pack_all(s, weights);
    }
    const Slot slot(index);
    barrier_wait(shared.v_full + 8 * slot.stage, slot.parity);
    multiply_values(weights, shared.v(slot.stage), o);
    wgmma_wait<0>();
    settle(o);
}

// Consumer 1 hands what it has over to consumer 0, whose threads have the same rows and columns.
__device__ __forceinline__ void merge(const Params& p, const Shared& shared, int consumer, int thread,
                                      float (&o)[DV / 2], Softmax& softmax) {
    const u32 mine = shared.merged + thread * 4;
    constexpr int STEP = WARPGROUP * 4, STATE = DV / 2;
    if (consumer == 1) {
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) store_shared(mine + i * STEP, o[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            store_shared(mine + (STATE + h) * STEP, softmax.max_score[h]);
            store_shared(mine + (STATE + 2 + h) * STEP, softmax.sum[h]);
        }
    }
    sync_threads(1, CONSUMER_THREADS);
    if (consumer == 1) return;
    float factor[2], other_factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float other = load_shared(mine + (STATE + h) * STEP), top = fmaxf(softmax.max_score[h], other);
        const float shift = top == MINUS_INFINITY ? 0.0f : top * p.scale_log2;
        factor[h] = exp2_approx(softmax.max_score[h] * p.scale_log2 - shift);
        other_factor[h] = exp2_approx(other * p.scale_log2 - shift);
        softmax.max_score[h] = top;
        softmax.sum[h] = softmax.sum[h] * factor[h] + load_shared(mine + (STATE + 2 + h) * STEP) * other_factor[h];
    }
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) {
        o[i] = o[i] * factor[i / 2 % 2] + load_shared(mine + i * STEP) * other_factor[i / 2 % 2];
    }
}

// ---- the output ---------------------------------------------------------------------------------------------------

struct Row {
    i64 index;  // of (batch, heads_q, seqlen_q)
    bool valid;
};

__device__ __forceinline__ Row out_row(const Params& p, const Tile& tile, u32 row) {
    const int query = tile.query + int(row / PACK);
    const u32 head = (tile.batch * p.groups.value + tile.group) * PACK + row % PACK;
    return {i64(head) * p.seqlen_q + query, row < QUERIES * PACK && query < p.seqlen_q};
}

__device__ __forceinline__ float log_sum(float max_score, float sum, float scale_log2) {
    constexpr float LN2 = 0.693147180559945309f;
    return sum == 0 ? MINUS_INFINITY : (max_score * scale_log2 + log2_approx(sum)) * LN2;
}

// A tile of one part: through shared memory, so that whole rows are written.
__device__ __forceinline__ void write_rows(const Params& p, const Tile& tile, const Shared& shared, int consumer,
                                           int thread, const float (&o)[DV / 2], const Softmax& softmax) {
    const int lane = thread % 32, first_row = 64 * consumer;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first_row + thread / 32 * 16 + lane / 4 + 8 * h;
        const float inverse = softmax.sum[h] > 0 ? inverse_approx(softmax.sum[h]) : 0;
#pragma unroll
        for (int c = 0; c < DV / 8; ++c) {
            const u32 both = pack(o[4 * c + 2 * h] * inverse, o[4 * c + 2 * h + 1] * inverse);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(swizzled(shared.q, ROWS, row, c) + lane % 4 * 4), "r"(both)
                         : "memory");
        }
        const Row place = out_row(p, tile, row);
        if (p.lse && lane % 4 == 0 && tile.column == 0 && place.valid) {
            p.lse[place.index] = log_sum(softmax.max_score[h], softmax.sum[h], p.scale_log2);
        }
    }
    sync_threads(2 + consumer, WARPGROUP);
    constexpr int CHUNKS = DV / 8;
    uint4* const out = static_cast<uint4*>(p.out);
#pragma unroll 4
    for (int index = thread; index < 64 * CHUNKS; index += WARPGROUP) {
        const int row = first_row + index / CHUNKS, chunk = index % CHUNKS;
        const Row place = out_row(p, tile, row);
        uint4 value;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(swizzled(shared.q, ROWS, row, chunk)));
        const int column = tile.column + 8 * chunk;
        if (place.valid && column < p.head_dim_v) out[(place.index * p.head_dim_v + column) / 8] = value;
    }
}

// A part of a tile of several: each row to the block of the cluster that adds it up.
__device__ __forceinline__ void send_rows(const Shared& shared, u32 rank, int consumer, int thread,
                                          const float (&o)[DV / 2], const Softmax& softmax) {
    const int lane = thread % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 row = shared.staged + (64 * consumer + thread / 32 * 16 + lane / 4 + 8 * h) * PART_ROW * 4;
#pragma unroll
        for (int c = 0; c < DV / 8; ++c) {
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + (8 * c + lane % 4 * 2) * 4),
                         "f"(o[4 * c + 2 * h]), "f"(o[4 * c + 2 * h + 1])
                         : "memory");
        }
        if (lane % 4 == 0) {
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + DV * 4), "f"(softmax.max_score[h]),
                         "f"(softmax.sum[h])
                         : "memory");
        }
    }
    fence_async();
    sync_threads(2 + consumer, WARPGROUP);
    // One thread sends to one block, and no warp to more than a few: a warp's copies are issued one after the other.
    const int first = 64 * consumer, block = first / SLICE + thread / 8;
    const int from = max(first, block * SLICE), to = min(first + 64, (block + 1) * SLICE);
    if (thread % 8 == 0 && from < to) {
        const u32 target = shared.received + (rank * SLICE + from - block * SLICE) * PART_ROW * 4;
        send(in_block(target, block), shared.staged + from * PART_ROW * 4, (to - from) * PART_ROW * 4,
             in_block(shared.all_received, block));
    }
}

__device__ __forceinline__ void add_rows(const Params& p, const Tile& tile, const Shared& shared, u32 rank,
                                         int thread) {
    constexpr int LANES = DV / 4;
    uint2* const out = static_cast<uint2*>(p.out);
    const int rows = min(SLICE, ROWS - int(rank) * SLICE);
    for (int index = thread; index < rows * LANES; index += CONSUMER_THREADS) {
        const int row = index / LANES, lane = index % LANES;
        const u32 first = shared.received + row * PART_ROW * 4;
        float part_max[CLUSTER], part_sum[CLUSTER], top = MINUS_INFINITY;
#pragma unroll
        for (int part = 0; part < CLUSTER; ++part) {
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(part_max[part]), "=f"(part_sum[part])
                         : "r"(first + (part * SLICE * PART_ROW + DV) * 4));
            top = fmaxf(top, part_max[part]);
        }
        const float shift = top == MINUS_INFINITY ? 0.0f : top * p.scale_log2;
        float sum = 0, total[4] = {0, 0, 0, 0};
#pragma unroll
        for (int part = 0; part < CLUSTER; ++part) {
            float x[4];
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                         : "r"(first + (part * SLICE * PART_ROW + 4 * lane) * 4));
            const float weight = exp2_approx(part_max[part] * p.scale_log2 - shift);
            sum += part_sum[part] * weight;
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += x[i] * weight;
        }
        const float inverse = sum > 0 ? inverse_approx(sum) : 0;
        const Row place = out_row(p, tile, rank * SLICE + row);
        if (!place.valid) continue;
        const int column = tile.column + 4 * lane;
        if (column < p.head_dim_v) {
            out[(place.index * p.head_dim_v + column) / 4] =
                make_uint2(pack(total[0] * inverse, total[1] * inverse), pack(total[2] * inverse, total[3] * inverse));
        }
        if (p.lse && column == 0) p.lse[place.index] = log_sum(top, sum, p.scale_log2);
    }
}

// ---- parts over L2 --------------------------------------------------------------------------------------------------

constexpr int CHUNKS = DV / 8;                    // of 8 columns and 16 rows: 32 lanes × 4 floats, in 3 words each
constexpr int TILE_CHUNKS = ROWS / 16 * CHUNKS;
constexpr int PART_WORDS = TILE_CHUNKS * 96 + ROWS * 2;
constexpr int ARRIVALS = PARTS * (ROWS / 64);

// Four floats without their last 8 bits in three words.
__device__ __forceinline__ void pack24(const float* x, u32 (&w)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) w[i] = __byte_perm(__float_as_uint(x[i]), __float_as_uint(x[3]), 0x3210 | (5 + i));
}

__device__ __forceinline__ void unpack24(const u32 (&w)[3], float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) x[i] = __uint_as_float(w[i] & 0xFFFFFF00u);
    x[3] = __uint_as_float(__byte_perm(__byte_perm(w[0], w[1], 0x0400), w[2], 0x4210) & 0xFFFFFF00u);
}

__device__ __forceinline__ u32* part_of(const Params& p, u32 rank) {
    return p.parts + (u64(blockIdx.x / PARTS) * PARTS + rank) * PART_WORDS;
}

__device__ __forceinline__ void publish(const Params& p, u32 rank, int consumer, int thread, const float (&o)[DV / 2],
                                        const Softmax& softmax) {
    const int lane = thread % 32, warp = consumer * 4 + thread / 32;
    u32* const mine = part_of(p, rank);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        u32 w[3];
        pack24(o + 4 * c, w);
#pragma unroll
        for (int i = 0; i < 3; ++i) mine[((warp * CHUNKS + c) * 3 + i) * 32 + lane] = w[i];
    }
    if (lane % 4 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            reinterpret_cast<float2*>(mine + TILE_CHUNKS * 96)[warp * 16 + lane / 4 + 8 * h] =
                make_float2(softmax.max_score[h], softmax.sum[h]);
        }
    }
    sync_threads(2 + consumer, WARPGROUP);
    if (thread == 0) {
        asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrivals + blockIdx.x / PARTS * 16) : "memory");
    }
}

__device__ __forceinline__ void await_parts(const Params& p, u64 before) {
    const u64 goal = (before / ARRIVALS + 1) * ARRIVALS;
    u64 now;
    do {
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(p.arrivals + blockIdx.x / PARTS * 16) : "memory");
    } while (now < goal);
}

__device__ __forceinline__ void add_parts(const Params& p, const Tile& tile, u32 rank, int thread) {
    const int lane = thread % 32;
    u32* const out = static_cast<u32*>(p.out);
    constexpr int BATCH = PARTS < 8 ? PARTS : 8;
    for (int chunk = int(rank) * TILE_CHUNKS / PARTS + thread / 32; chunk < int(rank + 1) * TILE_CHUNKS / PARTS;
         chunk += CONSUMER_THREADS / 32) {
        const int row = chunk / CHUNKS * 16 + lane / 4;
        float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0, 0}, total[4] = {0, 0, 0, 0};
        for (int first = 0; first < PARTS; first += BATCH) {
            float2 state[BATCH][2];
            u32 words[BATCH][3];
#pragma unroll
            for (int part = 0; part < BATCH; ++part) {
                const u32* const from = part_of(p, min(first + part, PARTS - 1));
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[part][i]) : "l"(from + (chunk * 3 + i) * 32 + lane));
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(state[part][h].x), "=f"(state[part][h].y) : "l"(from + TILE_CHUNKS * 96 + (row + 8 * h) * 2));
                    if (first + part >= PARTS) state[part][h] = make_float2(MINUS_INFINITY, 0);
                }
            }
            float shift[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float before = top[h];
#pragma unroll
                for (int part = 0; part < BATCH; ++part) top[h] = fmaxf(top[h], state[part][h].x);
                shift[h] = top[h] == MINUS_INFINITY ? 0.0f : top[h] * p.scale_log2;
                const float factor = exp2_approx(before * p.scale_log2 - shift[h]);
                sum[h] *= factor, total[2 * h] *= factor, total[2 * h + 1] *= factor;
            }
#pragma unroll
            for (int part = 0; part < BATCH; ++part) {
                float x[4];
                unpack24(words[part], x);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float weight = exp2_approx(state[part][h].x * p.scale_log2 - shift[h]);
                    sum[h] += state[part][h].y * weight;
                    total[2 * h] += x[2 * h] * weight, total[2 * h + 1] += x[2 * h + 1] * weight;
                }
            }
        }
        const int column = tile.column + chunk % CHUNKS * 8 + lane % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float inverse = sum[h] > 0 ? inverse_approx(sum[h]) : 0;
            const Row place = out_row(p, tile, row + 8 * h);
            if (!place.valid) continue;
            if (column < p.head_dim_v) {
                out[(place.index * p.head_dim_v + column) / 2] = pack(total[2 * h] * inverse, total[2 * h + 1] * inverse);
            }
            if (p.lse && column == 0) p.lse[place.index] = log_sum(top[h], sum[h], p.scale_log2);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    flash_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    if (threadIdx.x == WARPGROUP) prefetch(k_map), prefetch(v_map);
    const Shared shared(shared_address(memory));
    const u32 rank = blockIdx.x % PARTS;
    const Tile tile = tile_of(p, rank);
    const int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;

    if (threadIdx.x == 0) {
        barrier_init(shared.q_full, 1);
        barrier_init(shared.all_received, 1);
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared.k_full + 8 * stage, 1);
            barrier_init(shared.v_full + 8 * stage, 1);
            barrier_init(shared.k_empty + 8 * stage, CONSUMERS / SHARED_ROWS);
            barrier_init(shared.v_empty + 8 * stage, CONSUMERS / SHARED_ROWS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (tile.blocks) load_queries(tile, shared, q_map);
        const int rows = max(0, min(SLICE, ROWS - int(rank) * SLICE));
        if (CLUSTER > 1) barrier_expect(shared.all_received, CLUSTER * rows * PART_ROW * 4);
    }
    __syncthreads();
    if (CLUSTER > 1 && APART) cluster_arrive();  // nobody sends before all barriers are there

    if (warpgroup == 0) {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 0) produce(p, tile, shared, k_map, v_map);
        __syncwarp();
        if (CLUSTER > 1) {
            if (!APART) cluster_arrive();
            cluster_wait(), cluster_arrive(), cluster_wait();
        }
    } else {
        if (CONSUMERS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int consumer = warpgroup - 1;
        float o[DV / 2];
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[i] = 0;
        Softmax softmax;
        attend(p, tile, shared, consumer, thread, o, softmax);
        softmax.finish();
        u64 before = 0;  // none of this block's
        if (OVER_L2 && thread == 0) asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(before) : "l"(p.arrivals + blockIdx.x / PARTS * 16) : "memory");
        if (SHARED_ROWS > 1) merge(p, shared, consumer, thread, o, softmax);
        const bool has_rows = SHARED_ROWS == 1 || consumer == 0;
        if (OVER_L2) {
            if (has_rows) publish(p, rank, consumer, thread, o, softmax);
            if (thread == 0) await_parts(p, before);
            sync_threads(2 + consumer, WARPGROUP);
            add_parts(p, tile, rank, threadIdx.x - WARPGROUP);
        } else if (CLUSTER == 1) {
            if (has_rows) write_rows(p, tile, shared, consumer, thread, o, softmax);
        } else {
            if (!APART) cluster_arrive();  // nobody sends before all have read Q and the ring
            cluster_wait();
            if (APART && SHARED_ROWS == 1) sync_threads(1, CONSUMER_THREADS);  // all have read the ring
            if (has_rows) send_rows(shared, rank, consumer, thread, o, softmax);
            barrier_wait(shared.all_received, 0);
            __syncwarp();
            cluster_arrive();
            add_rows(p, tile, shared, rank, threadIdx.x - WARPGROUP);
            __syncwarp();
            cluster_wait();  // a block's memory outlives what it sends
        }
    }
}
