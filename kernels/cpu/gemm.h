// The two matrix products of attention: packing of their left side, and a kernel that keeps its sums in registers.
//
// C[row][lane] = Σ over steps of A(row, step) · B[step][lane]. B and C lie lane by lane. A is packed in panels of up to
// MICRO_ROWS rows, each [step][row], so that the kernel reads one stream from its start to its end: K as it lies, 512
// bytes from row to row, takes a tenth longer from L1 and a fifth from L2 (Zen 3, measured side by side).
//
// An element is 32 bits: a float, or with AVX512-BF16 a pair of bf16 that a step multiplies by another pair.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

// How elements multiply: `steps(n)` of them cover n numbers.
struct Fp32 {
    static constexpr int PER_STEP = 1;
    static vec multiply_add(float a, vec b, vec sum) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct Bf16Pairs {
    static constexpr int PER_STEP = 2;
    static vec multiply_add(float a, vec b, vec sum) {
        const __m512bh pairs = reinterpret_cast<__m512bh>(broadcast(a));
        return reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pairs, reinterpret_cast<__m512bh>(b)));
    }
};
template <class T> using Arithmetic = std::conditional_t<std::is_same_v<T, bfloat>, Bf16Pairs, Fp32>;
#else
template <class T> using Arithmetic = Fp32;
#endif

template <class T> inline int64_t steps(int64_t numbers) {
    constexpr int per_step = Arithmetic<T>::PER_STEP;
    return (numbers + per_step - 1) / per_step;
}

// Rows of the next panel where `left` rows are left. The last two share what is more than one and less than two, for a
// panel of one or two rows leaves the multipliers waiting for their own results.
inline int64_t panel_rows(int64_t left) {
    return left >= 2 * MICRO_ROWS || left <= MICRO_ROWS ? std::min<int64_t>(left, MICRO_ROWS) : (left + 1) / 2;
}

// ---- packing --------------------------------------------------------------------------------------------------------

constexpr int64_t PACKED_KEYS = 24;

// A panel of n rows takes n · steps elements, and LANES more that may be overwritten while it is packed.
inline int64_t packed_size(int64_t rows, int64_t steps) {
    return rows * steps + (rows / MICRO_ROWS + 2) * LANES;
}

// LANES elements of a row of `dim` numbers, from number `at` on; zeros after its end.
template <class T> inline vec load_elements(const T* row, int64_t at, int64_t dim) {
    if constexpr (Arithmetic<T>::PER_STEP == 1) {
        return load_part(row + at, dim - at);
    } else {
        T pairs[2 * LANES] = {};
        if (dim - at >= 2 * LANES) return load(reinterpret_cast<const float*>(row + at));
        std::copy_n(row + at, dim - at, pairs);
        return load(reinterpret_cast<const float*>(pairs));
    }
}

// to[step · width + i] = the elements of row_at(i), `dim` numbers, for i < count; zeros for i from `count` to `width`.
template <class T, class RowAt>
inline void pack_rows(const RowAt& row_at, int64_t count, int64_t dim, float* to, int64_t width) {
    // Where width is no multiple of LANES, what is stored too much belongs to the next step: to its first rows, which
    // are stored later, for the last LANES rows come first and the steps in their order.
    for (int64_t first = (width - 1) / LANES * LANES; first >= 0; first -= LANES)
        for (int64_t step = 0; step < steps<T>(dim); step += LANES) {
            vec x[LANES];
            UNROLL
            for (int i = 0; i < LANES; ++i)
                x[i] = first + i < count ? load_elements<T>(row_at(first + i), step * Arithmetic<T>::PER_STEP, dim) : vec{};
            transpose(x);
            float* column = to + step * width + first;
            const int64_t here = std::min<int64_t>(LANES, steps<T>(dim) - step);
            for (int64_t i = 0; i < here; ++i) store(column + i * width, x[i]);
        }
}

// The rows of K as A: panel after panel of rows.
template <class T> [[gnu::noinline]] void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t dim, float* to) {
    for (int64_t key = 0, rows; key < keys; key += rows) {
        rows = panel_rows(keys - key);
        pack_rows<T>([=](int64_t i) { return k + (key + i) * stride; }, rows, dim, to, rows);
        to += rows * steps<T>(dim) + LANES;
    }
}

// LANES elements of a step of V's columns, `left` columns before their end; of a pair, the second is the next row's.
template <class T> inline vec load_columns(const T* row, const T* next, int64_t left) {
    if constexpr (Arithmetic<T>::PER_STEP == 1) {
        return load_part(row, left);
    } else {
        const uvec low = reinterpret_cast<uvec>(load_part(row, left)) >> 16;
        return reinterpret_cast<vec>(next ? low | reinterpret_cast<uvec>(load_part(next, left)) : low);
    }
}

// The columns of V as A: panel after panel of columns, each [key][column]. It goes through some keys at a time: the rows
// that it reads again stay in L1, and what it writes is long enough to be fetched ahead.
template <class T> [[gnu::noinline]] void pack_columns(const T* v, int64_t stride, int64_t keys, int64_t dim, float* to) {
    constexpr int per_step = Arithmetic<T>::PER_STEP;
    const int64_t pitch = steps<T>(keys);
    for (int64_t first = 0; first < keys; first += PACKED_KEYS) {
        const int64_t end = std::min<int64_t>(keys, first + PACKED_KEYS);
        float* panel = to;
        for (int64_t at = 0, rows; at < dim; at += rows) {
            rows = panel_rows(dim - at);
            float* step = panel + first / per_step * rows;
            const T* row = v + first * stride + at;
            const auto pack = [&](auto known_rows, int64_t left) {
                for (int64_t key = first; key < end; key += per_step, row += per_step * stride, step += known_rows)
                    for (int64_t i = 0; i < known_rows; i += LANES)
                        store(step + i, load_columns(row + i, key + 1 < keys ? row + stride + i : nullptr, left - i));
            };
            if (dim - at >= 2 * MICRO_ROWS) pack(std::integral_constant<int64_t, MICRO_ROWS>{}, 2 * MICRO_ROWS);
            else pack(rows, dim - at);
            panel += rows * pitch + LANES;
        }
    }
}

// Memory to be read soon: `lines` at a time it is fetched into L2, while there is other work.
class Ahead {
public:
    template <class T> Ahead(const T* rows, int64_t stride, int64_t count, int64_t dim)
        : row_(reinterpret_cast<const char*>(rows)), stride_(stride * int64_t{sizeof(T)}),
          bytes_(dim * int64_t{sizeof(T)}), rows_left_(count) {}
    int64_t lines() const { return rows_left_ * ((bytes_ + 63) / 64); }
    void fetch(int64_t lines) {
        for (; lines > 0 && rows_left_ > 0; --lines) {
            __builtin_prefetch(row_ + at_, 0, 2);
            at_ += 64;
            if (at_ >= bytes_) at_ = 0, row_ += stride_, --rows_left_;
        }
    }

private:
    const char* row_;
    int64_t stride_, bytes_, rows_left_, at_ = 0;
};

// ---- the product ----------------------------------------------------------------------------------------------------

// With alpha, C · alpha is added to what is summed.
template <class Arithmetic, int ROWS, int VECS>
inline void micro_kernel(const float* a, int64_t steps, const vec* b, vec* c, const vec* alpha) {
    vec sum[ROWS][VECS] = {};
    UNROLL_4
    for (int64_t step = 0; step < steps; ++step) {
        UNROLL
        for (int row = 0; row < ROWS; ++row) {
            UNROLL
            for (int i = 0; i < VECS; ++i)
                sum[row][i] = Arithmetic::multiply_add(a[step * ROWS + row], b[step * VECS + i], sum[row][i]);
        }
    }
    UNROLL
    for (int row = 0; row < ROWS; ++row) {
        UNROLL
        for (int i = 0; i < VECS; ++i)
            c[row * VECS + i] = alpha ? c[row * VECS + i] * alpha[i] + sum[row][i] : sum[row][i];
    }
}

template <class Arithmetic, int VECS, int ROWS = MICRO_ROWS>
inline void micro_kernel(int64_t rows, const float* a, int64_t steps, const vec* b, vec* c, const vec* alpha) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return micro_kernel<Arithmetic, VECS, ROWS - 1>(rows, a, steps, b, c, alpha);
    micro_kernel<Arithmetic, ROWS, VECS>(a, steps, b, c, alpha);
}
