// The two matrix products of attention in vector registers.
//
// C[row][lane] = Σ over steps of A(row, step) · B[step][lane]. B and C lie lane by lane. A, the rows of K or the columns
// of V, is packed in panels of up to MICRO_ROWS rows, each [step][row], so that micro_kernel() reads one stream from its
// start to its end. Unpacked, 512 bytes from row to row, it takes a tenth longer (Zen 3, side by side).
#pragma once

#include "pack.h"

namespace {

// Rows of the next panel where `left` rows are left. The last two share what is more than one and less than two, for a
// panel of one or two rows leaves the multipliers waiting for their own results.
inline int64_t panel_rows(int64_t left) {
    return left >= 2 * MICRO_ROWS || left <= MICRO_ROWS ? std::min<int64_t>(left, MICRO_ROWS) : (left + 1) / 2;
}

template <bool PAIRS> inline vec multiply_add(float a, vec b, vec sum) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS)
        return reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(broadcast(a)),
                                                      reinterpret_cast<__m512bh>(b)));
#endif
    return sum + a * b;
}

// With alpha, C · alpha is added to what is summed.
template <bool PAIRS, int ROWS, int VECS>
inline void micro_kernel(const float* a, int64_t steps, const vec* b, vec* c, const vec* alpha) {
    vec sum[ROWS][VECS] = {};
    const auto add = [&](int64_t step) {
        UNROLL
        for (int row = 0; row < ROWS; ++row) {
            UNROLL
            for (int i = 0; i < VECS; ++i)
                sum[row][i] = multiply_add<PAIRS>(a[step * ROWS + row], b[step * VECS + i], sum[row][i]);
        }
    };
    if constexpr (ROWS == MICRO_ROWS) {
        UNROLL_BY(8)
        for (int64_t step = 0; step < steps; ++step) add(step);
    } else {  // rare: only longer to compile
        for (int64_t step = 0; step < steps; ++step) add(step);
    }
    UNROLL
    for (int row = 0; row < ROWS; ++row) {
        UNROLL
        for (int i = 0; i < VECS; ++i)
            c[row * VECS + i] = alpha ? c[row * VECS + i] * alpha[i] + sum[row][i] : sum[row][i];
    }
}

template <bool PAIRS, int VECS, int ROWS = MICRO_ROWS>
inline void micro_kernel(int64_t rows, const float* a, int64_t steps, const vec* b, vec* c, const vec* alpha) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return micro_kernel<PAIRS, VECS, ROWS - 1>(rows, a, steps, b, c, alpha);
    micro_kernel<PAIRS, ROWS, VECS>(a, steps, b, c, alpha);
}

// C = A · B for a panel of A, or with alpha C · alpha + A · B.
template <bool PAIRS, int VECS>
inline void multiply(int64_t rows, const float* a, int64_t steps, const vec* b, vec* c, const vec* alpha) {
    vec ones[VECS];
    std::fill_n(ones, VECS, broadcast(1.0f));
    for (int64_t step = 0; step < steps; step += SUMMED_STEPS)
        micro_kernel<PAIRS, VECS>(rows, a + step * rows, std::min<int64_t>(SUMMED_STEPS, steps - step), b + step * VECS, c,
                              step ? ones : alpha);
}

template <class T> struct VectorProducts {
    // Of a block. On Zen 3, where L2 has 512 KiB, 96 to 192 are within 2 % of each other at d = 128; SUMMED_STEPS divides
    // it.
    static constexpr int64_t KEYS = 128;
    static constexpr int64_t GRAIN = PER_STEP<T>;  // keys that are multiplied or left out together
    static constexpr bool RESCALES_FREE = true;    // C · alpha costs no pass of its own

    static int64_t dim_steps(int64_t dim) { return steps<T>(dim); }
    static int64_t k_floats(int64_t dim) { return packed(KEYS, dim); }
    static int64_t v_floats(int64_t dim_v) { return packed(dim_v, KEYS); }
    static int64_t panels(int64_t rows) { return rows / MICRO_ROWS + 1; }  // at most

    // The rows of K: panel after panel of rows.
    [[gnu::noinline]] static void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t dim, float* to) {
        for (int64_t key = 0, rows; key < keys; key += rows) {
            rows = panel_rows(keys - key);
            pack_rows<T>([=](int64_t i) { return k + (key + i) * stride; }, rows, dim, steps<T>(dim), to, rows);
            to += rows * steps<T>(dim) + LANES;
        }
    }

    // The columns of V: panel after panel of columns, each [key][column]. It goes through some keys at a time: the rows
    // that it reads again stay in L1, and what it writes is long enough to be fetched ahead.
    [[gnu::noinline]] static void pack_columns(const T* v, int64_t stride, int64_t keys, int64_t dim, float* to) {
        constexpr int64_t AT_ONCE = 24;
        const int64_t pitch = steps<T>(keys);
        for (int64_t first = 0; first < keys; first += AT_ONCE) {
            const int64_t end = std::min(keys, first + AT_ONCE);
            float* panel = to;
            for (int64_t at = 0, rows; at < dim; at += rows) {
                rows = panel_rows(dim - at);
                float* step = panel + first / PER_STEP<T> * rows;
                const T* row = v + first * stride + at;
                const auto pack = [&](auto known_rows, int64_t left) {
                    for (int64_t key = first; key < end; key += PER_STEP<T>, row += PER_STEP<T> * stride, step += known_rows)
                        for (int64_t i = 0; i < known_rows; i += LANES)
                            store(step + i, load_columns(row + i, key + 1 < keys ? row + stride + i : nullptr, left - i));
                };
                if (dim - at >= 2 * MICRO_ROWS) pack(std::integral_constant<int64_t, MICRO_ROWS>{}, 2 * MICRO_ROWS);
                else pack(rows, dim - at);
                panel += rows * pitch + LANES;
            }
        }
    }

    // S = Kp · Qt for keys from `from` to `to` and maybe some around them.
    template <int VECS>
    static void scores(const float* k, int64_t keys, int64_t dim, int64_t from, int64_t to, const vec* q, vec* s, Ahead& ahead) {
        for (int64_t key = 0, rows; key < to; key += rows) {
            rows = panel_rows(keys - key);
            ahead.fetch();
            if (key + rows > from) multiply<IN_PAIRS<T>, VECS>(rows, k, steps<T>(dim), q, s + key * VECS, nullptr);
            k += rows * steps<T>(dim) + LANES;
        }
    }

    // O = O · alpha + Vpᵀ · P for keys from `from`, a multiple of GRAIN, to `to`; P's rows are steps.
    template <int VECS>
    static void add_values(const float* v, int64_t keys, int64_t dim_v, int64_t from, int64_t to, const vec* p, vec* o,
                           const vec* alpha, Ahead& ahead) {
        const int64_t first = from / PER_STEP<T>, count = steps<T>(to - from);
        for (int64_t at = 0, rows; at < dim_v; at += rows) {
            rows = panel_rows(dim_v - at);
            ahead.fetch();
            multiply<IN_PAIRS<T>, VECS>(rows, v + first * rows, count, p + first * VECS, o + at * VECS, alpha);
            v += rows * steps<T>(keys) + LANES;
        }
    }

private:
    // A panel of n rows takes n · steps elements, and LANES more that may be overwritten while it is packed.
    static int64_t packed(int64_t rows, int64_t steps) { return rows * steps + panels(rows) * LANES; }
};

}  // namespace
