// softmax(scale · Q Kᵀ) V, a query a warp, the softmax rescaled as larger scores come (online softmax).
//
// q and out are (batch, heads_q, seqlen_q, …), k and v (batch, heads_kv, seqlen_k, …), all contiguous. The lanes of a
// warp share out the head dimension.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int LANES = 32, WARPS = 4, MAX_HEAD_DIM = 256, EACH = MAX_HEAD_DIM / LANES;

template <typename T>
__global__ void attention(const T* q, const T* k, const T* v, T* out, int rows, int heads_q, int heads_kv, int seqlen_q,
                          int seqlen_k, int head_dim, int head_dim_v, bool causal, float scale) {
    const int row = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (row >= rows) return;
    const int head = row / seqlen_q, index = row % seqlen_q;
    const long long head_kv = head / heads_q * heads_kv + head % heads_q / (heads_q / heads_kv);
    // Causal is aligned bottom-right: the last query sees every key.
    const int seen = causal ? max(0, seqlen_k - seqlen_q + index + 1) : seqlen_k;

    float query[EACH], weighted[EACH] = {}, largest = -INFINITY, sum = 0;
    for (int i = 0; i < EACH; ++i) {
        const int d = i * LANES + lane;
        query[i] = d < head_dim ? float(q[(long long)row * head_dim + d]) * scale : 0;
    }
    for (int start = 0; start < seen; start += LANES) {  // a key a lane; sums of so few rescale less and round less
        const int keys = min(LANES, seen - start);
        const T* key = k + (head_kv * seqlen_k + start) * head_dim;
        const T* value = v + (head_kv * seqlen_k + start) * head_dim_v;
        float mine = -INFINITY;
        for (int j = 0; j < keys; ++j) {
            float score = 0;
            for (int i = 0; i < EACH; ++i)
                if (const int d = i * LANES + lane; d < head_dim) score += query[i] * float(key[j * head_dim + d]);
            for (int other = LANES / 2; other; other /= 2) score += __shfl_xor_sync(~0u, score, other);
            if (j == lane) mine = score;
        }
        float top = mine;
        for (int other = LANES / 2; other; other /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
        top = fmaxf(top, largest);
        const float shrink = expf(largest - top), weight = expf(mine - top);
        largest = top;
        float part[EACH] = {}, part_sum = weight;
        for (int other = LANES / 2; other; other /= 2) part_sum += __shfl_xor_sync(~0u, part_sum, other);
        for (int j = 0; j < keys; ++j) {
            const float its = __shfl_sync(~0u, weight, j);
            for (int i = 0; i < EACH; ++i)
                if (const int d = i * LANES + lane; d < head_dim_v) part[i] += its * float(value[j * head_dim_v + d]);
        }
        sum = sum * shrink + part_sum;
        for (int i = 0; i < EACH; ++i) weighted[i] = weighted[i] * shrink + part[i];
    }
    for (int i = 0; i < EACH; ++i)  // a query that sees no key gives zeros
        if (const int d = i * LANES + lane; d < head_dim_v)
            out[(long long)row * head_dim_v + d] = T(seen ? weighted[i] / sum : 0.0f);
}

// dtype: 0 fp32, 1 fp16, 2 bf16. Gives a cudaError.
extern "C" int launch(const void* q, const void* k, const void* v, void* out, int batch, int heads_q, int heads_kv,
                      int seqlen_q, int seqlen_k, int head_dim, int head_dim_v, int causal, int dtype, float scale,
                      cudaStream_t stream) {
    const int rows = batch * heads_q * seqlen_q;
    const auto go = [&](auto zero) {
        using T = decltype(zero);
        attention<<<(rows + WARPS - 1) / WARPS, WARPS * LANES, 0, stream>>>(
            static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(out), rows,
            heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, causal, scale);
    };
    if (dtype == 0) go(0.0f);
    if (dtype == 1) go(__half());
    if (dtype == 2) go(__nv_bfloat16());
    return cudaGetLastError();
}
