// What a compiled kernel looks like from outside, for a CPU: attention in double, one number after the other.
//
// Macros: FLASH_PTO (with HEAD_DIM, KEYS, OUT_FP32) or FA_KERNEL, which entry points there are; and a fault: NO_OP,
// DROPPED_TAIL (the last 128 keys are never seen), UNNORMALISED, FLAT (it takes 12.4 µs whatever the work) or STATUS.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using half = _Float16;

// A stream as the tests have it: its owner decides when a task runs, and adds its time.
struct Stream {
    double now_us;
    void (*launch)(Stream*, void (*task)(void*), void* argument, double us);
};

struct Work {
    const half *q, *k, *v;
    void *out, *workspace;
    int64_t heads, heads_q, heads_kv, seqlen_q, seqlen_k, d, causal, diagonal, out_fp32, workspace_bytes;
    double scale;
};

namespace {

void attend(void* argument) {
    Work* work = static_cast<Work*>(argument);
    const Work& w = *work;
    if (w.workspace) std::memset(w.workspace, 0xff, w.workspace_bytes);  // all that it was given is its own
    int64_t seen_by_all = w.seqlen_k;
#ifdef DROPPED_TAIL
    seen_by_all -= 128;
#endif
    std::vector<double> weights(w.seqlen_k), sums(w.d);
#ifndef NO_OP
    for (int64_t head = 0; head < w.heads; ++head) {
        const int64_t head_kv = head / w.heads_q * w.heads_kv + head % w.heads_q / (w.heads_q / w.heads_kv);
        for (int64_t row = 0; row < w.seqlen_q; ++row) {
            const half* q = w.q + (head * w.seqlen_q + row) * w.d;
            int64_t seen = w.causal ? row + 1 + w.diagonal : w.seqlen_k;
            seen = seen < 0 ? 0 : seen > seen_by_all ? seen_by_all : seen;
            double largest = -INFINITY, total = 0;
            for (int64_t key = 0; key < seen; ++key) {
                const half* k = w.k + (head_kv * w.seqlen_k + key) * w.d;
                double score = 0;
                for (int64_t i = 0; i < w.d; ++i) score += double(q[i]) * double(k[i]);
                weights[key] = score * w.scale;
                largest = std::fmax(largest, weights[key]);
            }
            std::fill(sums.begin(), sums.end(), 0.0);
            for (int64_t key = 0; key < seen; ++key) {
                const half* v = w.v + (head_kv * w.seqlen_k + key) * w.d;
                const double weight = std::exp(weights[key] - largest);
                total += weight;
                for (int64_t i = 0; i < w.d; ++i) sums[i] += weight * double(v[i]);
            }
            if (total == 0) total = 1;
#ifdef UNNORMALISED
            total = 1;
#endif
            for (int64_t i = 0; i < w.d; ++i) {
                const int64_t at = (head * w.seqlen_q + row) * w.d + i;
                if (w.out_fp32)
                    static_cast<float*>(w.out)[at] = sums[i] / total;
                else
                    static_cast<half*>(w.out)[at] = sums[i] / total;
            }
        }
    }
#endif
}

std::vector<Work*> launched;  // kept: a captured task runs again

void launch(void* stream, const Work& work) {
    launched.push_back(new Work(work));
#ifdef FLAT
    const double us = 12.4;
#else
    const double us = 10 + double(work.heads) * work.seqlen_q * work.seqlen_k * work.d * 4 / 100e6;  // at 100 TFLOP/s
#endif
    static_cast<Stream*>(stream)->launch(static_cast<Stream*>(stream), attend, launched.back(), us);
}

}  // namespace

#ifdef FLASH_PTO
extern "C" int64_t flash_workspace(int blocks) { return int64_t(blocks) * 1000; }

extern "C" int flash_launch(void* stream, void* q, void* k, void* v, void* out, void* workspace, int heads, int heads_q,
                            int heads_kv, int seqlen_q, int seqlen_k, int causal, int blocks, float scale) {
#ifdef STATUS
    return 507899;
#endif
    if (heads % heads_q || heads_q % heads_kv || seqlen_q % 128 || seqlen_k % KEYS || blocks < 1 || blocks > 32)
        return -1;
    launch(stream, {static_cast<half*>(q), static_cast<half*>(k), static_cast<half*>(v), out, workspace, heads, heads_q,
                    heads_kv, seqlen_q, seqlen_k, HEAD_DIM, causal, seqlen_k - seqlen_q, OUT_FP32,
                    flash_workspace(blocks), scale});
    return 0;
}
#endif

#ifdef FA_KERNEL
// As the library's own: refuses in silence what it checks, and its buffers are all written to.
extern "C" void call_kernel(void* stream, int head_size, int s0, int s1, bool is_causal, uint8_t* q, uint8_t* k,
                            uint8_t* v, uint8_t* o, float* qk_fifo, uint16_t* p_fifo, float* exp_max_fifo,
                            float* pv_fifo, float* global_sum, float* exp_max, float* o_parts) {
    if (head_size != 128 || s0 % 128) return;
    const int64_t blocks = s0 / 128, slots = 8 * blocks;
    std::memset(qk_fifo, 0xff, slots * 128 * 256 * sizeof(float));
    std::memset(p_fifo, 0xff, slots * 128 * 256 * sizeof(uint16_t));
    std::memset(exp_max_fifo, 0xff, slots * 128 * sizeof(float));
    std::memset(pv_fifo, 0xff, slots * 128 * 128 * sizeof(float));
    std::memset(global_sum, 0xff, blocks * s0 * sizeof(float));
    std::memset(exp_max, 0xff, blocks * s0 * sizeof(float));
    std::memset(o_parts, 0xff, blocks * s0 * 128 * sizeof(float));
    launch(stream, {reinterpret_cast<half*>(q), reinterpret_cast<half*>(k), reinterpret_cast<half*>(v), o, nullptr, 1, 1,
                    1, s0, s1, 128, is_causal, 0, 1, 0, 1 / std::sqrt(128.0)});
}
#endif
