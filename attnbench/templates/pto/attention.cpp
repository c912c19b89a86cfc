// softmax(scale · Q Kᵀ) V on an Ascend 910B's vector cores, a query at a time, written with PTO's tile instructions.
//
// q and out are (batch, heads_q, seqlen_q, D), k and v (batch, heads_kv, seqlen_k, D), all fp16 and contiguous. The
// scores of one query, MAX_KEYS at most, stay in the unified buffer, so the softmax is a plain one; K and V pass by in
// tiles of KEYS. It leaves the cube cores idle: a start, not a fast kernel.

#include <cstdint>
#include <pto/pto-inst.hpp>

#if defined(__DAV_VEC__) || defined(__CPU_SIM)
using namespace pto;

constexpr int KEYS = 64, MAX_KEYS = 8192;

// Bytes of the unified buffer. The largest tile, of floats, takes 64 × 128 × 4 = 32 KiB, as do the scores.
constexpr uint32_t HALVES = 0x0, FLOATS = 0x4000, PRODUCTS = 0xC000, SCRATCH = 0x14000, SCORES = 0x1C000;
constexpr uint32_t QUERY = 0x24000, RESULT = 0x24200, PART = 0x24400, LARGEST = 0x24600, SUM = 0x24620;

template <typename T, int rows, int columns>
using Rows = Tile<TileType::Vec, T, rows, columns, BLayout::RowMajor, rows, columns>;
template <int rows>
using Column = Tile<TileType::Vec, float, rows, 1, BLayout::ColMajor, rows, 1>;
// One number, as a reduction leaves it and as an expansion takes it: two views of the same bytes.
using Reduced = Tile<TileType::Vec, float, 1, 8, BLayout::RowMajor, 1, 1>;
using Expanded = Tile<TileType::Vec, float, 8, 1, BLayout::ColMajor, 1, 1>;
using Scores = Tile<TileType::Vec, float, 1, MAX_KEYS, BLayout::RowMajor, 1, DYNAMIC>;

// Every step reads what the one before it wrote, in another unit or the same.
#define THEN pipe_barrier(PIPE_ALL)

// `rows` rows of D halves from memory, as floats.
template <int rows, int D>
AICORE inline void load(Rows<float, rows, D>& to, __gm__ half* from) {
    GlobalTensor<half, Shape<1, 1, 1, rows, D>, Stride<rows * D, rows * D, rows * D, D, 1>> memory(from);
    Rows<half, rows, D> halves;
    TASSIGN(halves, HALVES);
    TLOAD(halves, memory);
    THEN;
    TCVT(to, halves, RoundMode::CAST_NONE);
    THEN;
}

template <int D>
AICORE inline void attend(__gm__ half* q, __gm__ half* k, __gm__ half* v, __gm__ half* out, int seqlen_k, float scale) {
    Rows<float, 1, D> query, result, part;
    Rows<float, KEYS, D> tile, products, scratch;
    Scores scores(seqlen_k), row_scratch(seqlen_k);
    Reduced largest, sum;
    Expanded all_largest, all_sum;
    TASSIGN(query, QUERY);
    TASSIGN(result, RESULT);
    TASSIGN(part, PART);
    TASSIGN(tile, FLOATS);
    TASSIGN(products, PRODUCTS);
    TASSIGN(scratch, SCRATCH);
    TASSIGN(scores, SCORES);
    TASSIGN(row_scratch, PRODUCTS);
    TASSIGN(largest, LARGEST);
    TASSIGN(all_largest, LARGEST);
    TASSIGN(sum, SUM);
    TASSIGN(all_sum, SUM);

    load(query, q);
    TMULS(query, query, scale);
    THEN;
    for (int key = 0; key < seqlen_k; key += KEYS) {
        Column<KEYS> these;
        TASSIGN(these, SCORES + key * sizeof(float));
        load(tile, k + key * D);
        TCOLEXPANDMUL(products, tile, query);
        THEN;
        TROWSUM(these, products, scratch);
        THEN;
    }

    TROWMAX(largest, scores, row_scratch);
    THEN;
    TROWEXPANDSUB(scores, scores, all_largest);
    THEN;
    TEXP(scores, scores);
    THEN;
    TROWSUM(sum, scores, row_scratch);
    TEXPANDS(result, 0.0f);
    THEN;

    for (int key = 0; key < seqlen_k; key += KEYS) {
        Column<KEYS> weights;
        TASSIGN(weights, SCORES + key * sizeof(float));
        load(tile, v + key * D);
        TROWEXPANDMUL(products, tile, weights);
        THEN;
        TCOLSUM(part, products, scratch, true);
        THEN;
        TADD(result, result, part);
        THEN;
    }

    TROWEXPANDDIV(result, result, all_sum);
    THEN;
    Rows<half, 1, D> halves;
    TASSIGN(halves, HALVES);
    TCVT(halves, result, RoundMode::CAST_RINT);
    THEN;
    GlobalTensor<half, Shape<1, 1, 1, 1, D>, Stride<D, D, D, D, 1>> memory(out);
    TSTORE(memory, halves);
    THEN;
}
#endif

template <int D>
__global__ AICORE void attention(__gm__ void* q, __gm__ void* k, __gm__ void* v, __gm__ void* out, int rows,
                                 int heads_q, int heads_kv, int seqlen_q, int seqlen_k, float scale) {
#if defined(__DAV_VEC__) || defined(__CPU_SIM)
    const int cores = get_block_num() * get_subblockdim();
    for (int row = get_block_idx() * get_subblockdim() + get_subblockid(); row < rows; row += cores) {
        const int head = row / seqlen_q;
        const int64_t head_kv = head / heads_q * heads_kv + head % heads_q / (heads_q / heads_kv);
        const int64_t at = int64_t(row) * D, keys = head_kv * seqlen_k * D;
        attend<D>((__gm__ half*)q + at, (__gm__ half*)k + keys, (__gm__ half*)v + keys, (__gm__ half*)out + at,
                  seqlen_k, scale);
    }
#endif
}

#ifndef __CPU_SIM
// Gives 0, or 1 for a head_dim that there is no kernel for.
extern "C" int launch(void* q, void* k, void* v, void* out, int rows, int heads_q, int heads_kv, int seqlen_q,
                      int seqlen_k, int head_dim, float scale, int blocks, void* stream) {
    if (head_dim != 64 && head_dim != 128) return 1;
    const auto kernel = head_dim == 64 ? attention<64> : attention<128>;
    kernel<<<blocks, nullptr, stream>>>(q, k, v, out, rows, heads_q, heads_kv, seqlen_q, seqlen_k, scale);
    return 0;
}
#endif
