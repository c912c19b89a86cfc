// softmax(scale · Q Kᵀ) V, a query at a time, the softmax rescaled as larger scores come (online softmax).
//
// q and out are (batch, heads_q, seqlen_q, …), k and v (batch, heads_kv, seqlen_k, …), all fp32 and contiguous.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t heads_q,
                          int64_t heads_kv, int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                          int64_t causal, int64_t threads, float scale) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < batch * heads_q * seqlen_q; ++row) {
        const int64_t head = row / seqlen_q, index = row % seqlen_q;
        const int64_t head_kv = head / heads_q * heads_kv + head % heads_q / (heads_q / heads_kv);
        const float* query = q + row * head_dim;
        // Causal is aligned bottom-right: the last query sees every key.
        const int64_t seen = causal ? std::max<int64_t>(0, seqlen_k - seqlen_q + index + 1) : seqlen_k;
        double largest = -INFINITY, sum = 0;
        std::vector<double> weighted(head_dim_v, 0.0);
        for (int64_t i = 0; i < seen; ++i) {
            const float* key = k + (head_kv * seqlen_k + i) * head_dim;
            const float* value = v + (head_kv * seqlen_k + i) * head_dim_v;
            double score = 0;
#pragma omp simd reduction(+ : score)
            for (int64_t d = 0; d < head_dim; ++d) score += double(query[d]) * key[d];
            score *= scale;
            if (score > largest) {
                const double shrink = std::exp(largest - score);
                sum *= shrink;
                for (double& each : weighted) each *= shrink;
                largest = score;
            }
            const double weight = std::exp(score - largest);
            sum += weight;
            for (int64_t d = 0; d < head_dim_v; ++d) weighted[d] += weight * value[d];
        }
        // A query that sees no key gives zeros.
        for (int64_t d = 0; d < head_dim_v; ++d) out[row * head_dim_v + d] = seen ? float(weighted[d] / sum) : 0.0f;
    }
}
