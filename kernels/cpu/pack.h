// Elements, the 32 bits that a product's step multiplies, and their way from a tensor into scratch; prefetching.
//
// An element is a float, or a pair of bf16 where the CPU multiplies those: two numbers of a row of Q or K, or the same
// column of two rows of V.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

#if defined(__AVX512BF16__)
template <class T> constexpr bool IN_PAIRS = std::is_same_v<T, bfloat>;
#else
template <class T> constexpr bool IN_PAIRS = false;
#endif
template <class T> constexpr int64_t PER_STEP = IN_PAIRS<T> ? 2 : 1;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class T> inline int64_t steps(int64_t numbers) { return ceil_div(numbers, PER_STEP<T>); }

// LANES elements of a row of `dim` numbers, from number `at` on; zeros after its end.
template <class T> inline vec load_elements(const T* row, int64_t at, int64_t dim) {
    if constexpr (!IN_PAIRS<T>) {
        return load_part(row + at, dim - at);
    } else {
        if (dim - at >= 2 * LANES) return load_bits(row + at);
        T pairs[2 * LANES] = {};
        std::copy_n(row + at, std::max<int64_t>(0, dim - at), pairs);
        return load_bits(pairs);
    }
}

// LANES elements of a step of V's columns, `left` columns before their end; of a pair, the second is the next row's, or
// zero without one.
template <class T> inline vec load_columns(const T* row, const T* next, int64_t left) {
    if constexpr (!IN_PAIRS<T>) {
        return load_part(row, left);
    } else {
        const uvec low = reinterpret_cast<uvec>(load_part(row, left)) >> 16;
        return reinterpret_cast<vec>(next ? low | reinterpret_cast<uvec>(load_part(next, left)) : low);
    }
}

// to[step · width + i] = the elements of row_at(i), `dim` numbers, for i < count, and zeros for i from count to width, in
// `steps` steps.
template <class T, class RowAt>
inline void pack_rows(const RowAt& row_at, int64_t count, int64_t dim, int64_t steps, float* to, int64_t width) {
    // Where width is no multiple of LANES, what is stored too much belongs to the next step: to its first rows, which
    // are stored later, for the last LANES rows come first and the steps in their order.
    for (int64_t first = (width - 1) / LANES * LANES; first >= 0; first -= LANES)
        for (int64_t step = 0; step < steps; step += LANES) {
            vec x[LANES];
            UNROLL
            for (int i = 0; i < LANES; ++i)
                x[i] = first + i < count ? load_elements<T>(row_at(first + i), step * PER_STEP<T>, dim) : vec{};
            transpose(x);
            float* column = to + step * width + first;
            const int64_t here = std::min<int64_t>(LANES, steps - step);
            for (int64_t i = 0; i < here; ++i) store(column + i * width, x[i]);
        }
}

constexpr int64_t LINE_BYTES = 64;  // of a cache
template <class T> constexpr int64_t elements_of_line() { return LINE_BYTES / int64_t{sizeof(T)}; }

// Rows that are read soon, fetched into L1 little by little, in their order, while there is other work.
class Ahead {
public:
    // Where all is to be fetched in `calls` equal shares.
    template <class T>
    Ahead(const T* rows, int64_t stride, int64_t count, int64_t dim, int64_t calls = 1)
        : row_(reinterpret_cast<const char*>(rows)), line_(row_), end_(row_), stride_(stride * int64_t{sizeof(T)}),
          bytes_(dim * int64_t{sizeof(T)}), rows_left_(count), share_(ceil_div(count * ceil_div(bytes_, LINE_BYTES), calls)) {
        if (stride_ == bytes_ && count > 0) bytes_ *= count, rows_left_ = 1;  // rows without gaps are one
    }

    void fetch() { fetch(share_); }
    [[gnu::always_inline]] void fetch(int64_t lines) {
        for (; lines > 0; --lines, line_ += LINE_BYTES) {
            if (line_ >= end_) {
                if (rows_left_ <= 0) return;
                line_ = row_, end_ = row_ + bytes_, row_ += stride_, --rows_left_;
            }
            __builtin_prefetch(line_, 0, 3);
        }
    }

private:
    const char *row_, *line_, *end_;
    int64_t stride_, bytes_;
    int64_t rows_left_, share_;
};

}  // namespace
