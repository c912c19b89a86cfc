// The two matrix products of attention in bf16 by AMX: tiles of 16 × 16 sums, each step of which multiplies 32 numbers.
//
// A, the rows of K or the columns of V, is packed in panels of two tiles, [panel][16 steps][tile][row][step], with zeros
// where a panel or the steps end; B, which is Q or P in pairs, and C lie as the vectors' do. Two tiles of A and up to
// two of B are multiplied at a time, into four of C.
//
// C · alpha is a pass over O of its own here, so attend() lets alpha be 1 as long as it can.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "pack.h"

namespace {

// Whether the system lets this process use tiles; it asks once.
inline bool amx_granted() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl, in Linux's asm/prctl.h
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// While it lives, this thread has eight tiles of 16 rows of 64 bytes.
class AmxTiles {
public:
    AmxTiles() {
        struct Config {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        };
        // Static: some compilers do not know that all of it is read, and would not fill a local one.
        alignas(64) static constexpr Config config = {
            1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&config);
    }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;
};

struct AmxProducts {
    using T = bfloat;
    static constexpr int64_t SIDE = 16, PANEL = 2 * SIDE, TILE_FLOATS = SIDE * SIDE;
    static constexpr int64_t KEYS = 256;
    static constexpr int64_t GRAIN = PANEL;  // keys of 16 steps
    static constexpr bool RESCALES_FREE = false;

    static int64_t dim_steps(int64_t dim) { return round_up(steps<T>(dim), SIDE); }
    static int64_t k_floats(int64_t dim) { return KEYS * dim_steps(dim); }
    static int64_t v_floats(int64_t dim_v) { return round_up(dim_v, PANEL) * (KEYS / 2); }
    static int64_t panels(int64_t rows) { return ceil_div(rows, PANEL); }

    [[gnu::noinline]] static void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t dim, float* to) {
        const int64_t blocks = dim_steps(dim) / SIDE;
        for (int64_t key = 0; key < round_up(keys, PANEL); ++key) {
            float* row = to + key / PANEL * PANEL * blocks * SIDE + key % PANEL * SIDE;
            for (int64_t block = 0; block < blocks; ++block)
                store(row + block * 2 * TILE_FLOATS,
                      key < keys ? load_elements(k + key * stride, block * PANEL, dim) : vec{});
        }
    }

    [[gnu::noinline]] static void pack_columns(const T* v, int64_t stride, int64_t keys, int64_t dim, float* to) {
        const int64_t blocks = ceil_div(keys, PANEL);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t at = 0; at < round_up(dim, PANEL); at += SIDE) {
                vec x[LANES];
                UNROLL
                for (int64_t i = 0; i < SIDE; ++i) {
                    const int64_t key = block * PANEL + 2 * i;
                    const T* row = v + key * stride + at;
                    x[i] = key < keys && at < dim ? load_columns(row, key + 1 < keys ? row + stride : nullptr, dim - at) : vec{};
                }
                transpose(x);
                float* tile = to + (at / PANEL * blocks + block) * 2 * TILE_FLOATS + at % PANEL * SIDE;
                UNROLL
                for (int64_t i = 0; i < SIDE; ++i) store(tile + i * SIDE, x[i]);
            }
    }

    template <int VECS>
    static void scores(const float* k, int64_t, int64_t dim, int64_t from, int64_t to, const vec* q, vec* s, Ahead& ahead) {
        const int64_t blocks = dim_steps(dim) / SIDE;
        for (int64_t panel = 0; panel * PANEL < to; ++panel) {
            ahead.fetch();
            if ((panel + 1) * PANEL > from)
                multiply<VECS, false>(k + panel * PANEL * blocks * SIDE, blocks, q, s + panel * PANEL * VECS);
        }
    }

    template <int VECS>
    static void add_values(const float* v, int64_t keys, int64_t dim_v, int64_t from, int64_t to, const vec* p, vec* o,
                           const vec* alpha, Ahead& ahead) {
        bool rescale = false;
        for (int i = 0; i < VECS; ++i)
            for (int lane = 0; lane < LANES; ++lane) rescale |= alpha[i][lane] != 1.0f;
        if (rescale)
            for (int64_t row = 0; row < dim_v; ++row)
                for (int i = 0; i < VECS; ++i) o[row * VECS + i] *= alpha[i];
        const int64_t blocks = ceil_div(keys, PANEL), first = from / PANEL, count = ceil_div(to, PANEL) - first;
        for (int64_t panel = 0; panel < panels(dim_v); ++panel) {
            ahead.fetch();
            multiply<VECS, true>(v + (panel * blocks + first) * 2 * TILE_FLOATS, count, p + first * SIDE * VECS,
                                 o + panel * PANEL * VECS);
        }
    }

private:
    // C = A · B, or C + A · B, for a panel of A.
    template <int VECS, bool ADD> static void multiply(const float* a, int64_t blocks, const vec* b, vec* c) {
        constexpr int PITCH = VECS * LANES * 4;  // bytes from row to row of B and C
        asm volatile("" : : : "memory");         // compilers do not know that tiles are loads and stores
        if constexpr (ADD) {
            _tile_loadd(0, c, PITCH);
            _tile_loadd(2, c + SIDE * VECS, PITCH);
            if constexpr (VECS == 2) _tile_loadd(1, c + 1, PITCH);
            if constexpr (VECS == 2) _tile_loadd(3, c + SIDE * VECS + 1, PITCH);
        } else {
            _tile_zero(0);
            _tile_zero(2);
            if constexpr (VECS == 2) _tile_zero(1);
            if constexpr (VECS == 2) _tile_zero(3);
        }
        for (int64_t block = 0; block < blocks; ++block, a += 2 * TILE_FLOATS, b += SIDE * VECS) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, PITCH);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + TILE_FLOATS, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (VECS == 2) {
                _tile_loadd(7, b + 1, PITCH);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, PITCH);
        _tile_stored(2, c + SIDE * VECS, PITCH);
        if constexpr (VECS == 2) _tile_stored(1, c + 1, PITCH);
        if constexpr (VECS == 2) _tile_stored(3, c + SIDE * VECS + 1, PITCH);
        asm volatile("" : : : "memory");
    }
};

}  // namespace
