// Vectors of fp32 on the CPU that the compiler targets, in GNU vector extensions (g++ ≥ 11, clang ≥ 15): their sizes,
// exp2, loads that widen, stores that narrow, transposes. Knows nothing of attention.
//
// Intrinsics stand only where the extensions lack a word.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define UNROLL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(n) UNROLL_PRAGMA(unroll n)
#else
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_BY(n) UNROLL_PRAGMA(GCC unroll n)
#endif

// gemm.h keeps MICRO_ROWS × MICRO_VECS vectors of a product in registers: as many as can accumulate.
#if defined(__AVX512F__)
constexpr int LANES = 16, MICRO_ROWS = 12, MICRO_VECS = 2;  // 24 of 32 registers
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define FLASH_AMX
constexpr char ISA[] = "amx_bf16";
#elif defined(__AVX512BF16__)
constexpr char ISA[] = "avx512_bf16";
#else
constexpr char ISA[] = "avx512";
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int LANES = 8, MICRO_ROWS = 6, MICRO_VECS = 2;  // 12 of 16
constexpr char ISA[] = "avx2";
#elif defined(__aarch64__)
constexpr int LANES = 4, MICRO_ROWS = 6, MICRO_VECS = 4;  // 24 of 32
constexpr char ISA[] = "neon";
#else
constexpr int LANES = 4, MICRO_ROWS = 6, MICRO_VECS = 2;  // 12 of 16
constexpr char ISA[] = "portable";
#endif
// Steps that are summed before the sum is added to others (AMX, which is for bf16 alone, has no such end): rounding errors
// grow with the length of a sum. 64 cost 2.5 % of the speed, and make the largest fp32 errors 0.6 to 1.05 times those of
// torch's sdpa instead of 0.9 to 1.6 times (benchmarks/accuracy.py). Without FMA each product is rounded too.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int SUMMED_STEPS = 64;
#else
constexpr int SUMMED_STEPS = 32;
#endif

// may_alias: scratch is filled lane by lane and read vector by vector.
typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint16_t svec __attribute__((vector_size(LANES * 2), may_alias));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INF = std::numeric_limits<float>::infinity();

struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline vec broadcast(float x) { return x - vec{}; }  // x + 0 would be an addition, for -0 + 0 is 0
inline vec maximum(vec a, vec b) { return a > b ? a : b; }  // b where one of them is NaN

// ---- exp2 -----------------------------------------------------------------------------------------------------------

// 2ⁿ · p(r) with x = n + r, |r| ≤ 1/2 and p(0) = 1. 0 below -127 and for -inf; NaN stays NaN. p is of degree 6, and all
// in all the relative error below 8.0e-8 (1.1e-7 without FMA; every 8th float of [-126, 0] measured). Degree 5 would be
// 0.3 % faster, and have 1.6e-7. Where the result is to be rounded to bf16 anyway, degree 4 does, with 3e-6.
template <bool TO_BF16 = false> inline vec exp2(vec x) {
    constexpr float MAGIC = 0x1.8p23f + 127.0f;  // a float of this size ends in the ones: adding it rounds x
    x = maximum(broadcast(-127.0f), x);
    const vec shifted = x + MAGIC, r = x - (shifted - MAGIC);
    vec p;
    if constexpr (TO_BF16) {
        p = r * 0x1.3a0518p-7f + 0x1.c9fc68p-5f;
        p = p * r + 0x1.ec036ep-3f;
        p = p * r + 0x1.62e12cp-1f;
    } else {
        p = r * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
        p = p * r + 0x1.3b2d4cp-7f;
        p = p * r + 0x1.c6aee8p-5f;
        p = p * r + 0x1.ebfbdcp-3f;
        p = p * r + 0x1.62e430p-1f;
    }
    p = p * r + 1.0f;
    const uvec power = reinterpret_cast<uvec>(shifted) << 23;  // n + 127 becomes the exponent; the rest leaves
    return p * reinterpret_cast<vec>(power);
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

inline vec load_bits(const void* from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline vec load(const float* from) { return load_bits(from); }

// x itself, loaded once: of what is used several times, g++ would make a load for each use.
inline vec in_register(vec x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

inline uvec load_wide(const void* from) {
    svec bits;
    std::memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)  // g++ 12 makes five instructions of the conversion
    return reinterpret_cast<uvec>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
    return reinterpret_cast<uvec>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
    return __builtin_convertvector(bits, uvec);
#endif
}

inline vec load(const bfloat* from) { return reinterpret_cast<vec>(load_wide(from) << 16); }

inline vec load(const half* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    return reinterpret_cast<vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    const uvec wide = load_wide(from), magnitude = (wide & 0x7fffu) << 13;
    const uvec finite = reinterpret_cast<uvec>(reinterpret_cast<vec>(magnitude) * 0x1p112f);  // subnormals too
    const uvec special = magnitude >= 0x0f800000u ? uvec{} + 0x7f800000u : uvec{};
    return reinterpret_cast<vec>(finite | special | (wide & 0x8000u) << 16);
#endif
}

// The first `count` elements, then zeros; nothing beyond them is read.
template <class T> inline vec load_part(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }

// To nearest, ties to even; NaN stays NaN.
inline void store(bfloat* to, vec x) {
    const uvec bits = reinterpret_cast<uvec>(x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    const svec narrow = __builtin_convertvector((x != x ? bits | 0x400000u : rounded) >> 16, svec);
    std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(half* to, vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), 0));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
    const uvec bits = reinterpret_cast<uvec>(x), magnitude = bits & 0x7fffffffu;
    const uvec normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // A half's subnormals are multiples of 2^-24, and so is the last bit of a float at 0.5.
    const uvec subnormal = reinterpret_cast<uvec>(reinterpret_cast<vec>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uvec finite = magnitude < 0x38800000u ? subnormal : normal;
    const uvec special = magnitude > 0x7f800000u ? uvec{} + 0x7e00u : uvec{} + 0x7c00u;
    const uvec narrow = (magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u);
    const svec stored = __builtin_convertvector(narrow, svec);
    std::memcpy(to, &stored, sizeof stored);
#endif
}

template <class T> inline void store_part(T* to, vec x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T padded[LANES];
    store(padded, x);
    std::memcpy(to, padded, count * sizeof(T));
}

// ---- shuffles -------------------------------------------------------------------------------------------------------

// Lane i of the result is lane PICK(i) of a and b, those of b counted from LANES on.
template <class Pick, int... I> inline vec shuffle(vec a, vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Pick::from(I)...);
#else
    return __builtin_shuffle(a, b, ivec{Pick::from(I)...});
#endif
}
template <class Pick> inline vec shuffle(vec a, vec b) {
    return shuffle<Pick>(a, b, std::make_integer_sequence<int, LANES>{});
}

// Within each four lanes: the low (HIGH: high) WIDTH · 2 of a and b, WIDTH at a time in turns.
template <int WIDTH, bool HIGH> struct Zip {
    static constexpr int from(int i) {
        const int four = i & ~3, at = i & 3, pair = at / (2 * WIDTH), which = at / WIDTH & 1, within = at % WIDTH;
        return four + which * LANES + (WIDTH == 1 ? pair : 0) + within + (HIGH ? 2 : 0);
    }
};
// Every second run of SIZE lanes, of a and then of b, put where the even (ODD: odd) ones were.
template <int SIZE, bool ODD> struct Swap {
    static constexpr int from(int i) {
        const bool odd = i & SIZE;
        return ODD ? (odd ? i + LANES : i + SIZE) : (odd ? i - SIZE + LANES : i);
    }
};

// Exchanges runs of SIZE lanes with rows of the same distance, for SIZE = 4, 8, … below LANES.
template <int SIZE> inline void transpose_runs(vec (&x)[LANES]) {
    if constexpr (SIZE < LANES) {
        UNROLL
        for (int i = 0; i < LANES; ++i)
            if (!(i & SIZE)) {
                const vec low = shuffle<Swap<SIZE, false>>(x[i], x[i + SIZE]);
                x[i + SIZE] = shuffle<Swap<SIZE, true>>(x[i], x[i + SIZE]);
                x[i] = low;
            }
        transpose_runs<SIZE * 2>(x);
    }
}

// x[i][j] becomes x[j][i].
inline void transpose(vec (&x)[LANES]) {
    UNROLL
    for (int i = 0; i < LANES; i += 4) {
        const vec low0 = shuffle<Zip<1, false>>(x[i], x[i + 1]), high0 = shuffle<Zip<1, true>>(x[i], x[i + 1]);
        const vec low1 = shuffle<Zip<1, false>>(x[i + 2], x[i + 3]), high1 = shuffle<Zip<1, true>>(x[i + 2], x[i + 3]);
        x[i] = shuffle<Zip<2, false>>(low0, low1), x[i + 1] = shuffle<Zip<2, true>>(low0, low1);
        x[i + 2] = shuffle<Zip<2, false>>(high0, high1), x[i + 3] = shuffle<Zip<2, true>>(high0, high1);
    }
    transpose_runs<4>(x);
}

template <int BY> struct Rotate {
    static constexpr int from(int i) { return (i + BY) % LANES; }
};
template <class F, int BY = LANES / 2> inline float over_lanes(vec x, const F& f) {
    if constexpr (BY > 0) return over_lanes<F, BY / 2>(f(x, shuffle<Rotate<BY>>(x, x)), f);
    else return x[0];
}
inline float sum_of_lanes(vec x) {
    return over_lanes(x, [](vec a, vec b) { return a + b; });
}
// Lane i of the result is the sum of x[i]'s lanes, for LANES vectors, which are lost.
template <int SIZE = LANES / 2> inline vec sums_of_lanes(vec* x) {
    UNROLL
    for (int i = 0; i < SIZE; ++i)
        x[i] = shuffle<Swap<SIZE, false>>(x[i], x[i + SIZE]) + shuffle<Swap<SIZE, true>>(x[i], x[i + SIZE]);
    if constexpr (SIZE > 1) return sums_of_lanes<SIZE / 2>(x);
    else return x[0];
}
inline float maximum_of_lanes(vec x) { return over_lanes(x, maximum); }

}  // namespace
