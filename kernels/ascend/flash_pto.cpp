// softmax(scale · Q Kᵀ) V on an Ascend 910B, in PTO's tile instructions: the cube cores multiply, the vector cores do
// the softmax, and the keys of a query tile are split over cores where there are more cores than query tiles.
//
// Not yet run on hardware. docs/kernels/ascend.md says what was checked in simulations, and argues for each flag.
//
// q and out are (batch, heads_q, seqlen_q, D), k and v (batch, heads_kv, seqlen_k, D); all are contiguous, and fp16
// but for out, which is fp32 where OUT_FP32 is 1. A causal mask is aligned bottom-right; a query that sees no key gives
// zeros. Compile-time: D (HEAD_DIM, 64 or 128), KEYS (128 or 256, the keys of a unit) and OUT_FP32. seqlen_q must be a
// multiple of ROWS = 128, seqlen_k one of KEYS. Nothing here checks its arguments but `flash_launch`, for what it can.
//
// Work. A unit is a query tile of 128 rows by KEYS keys. All units of all heads in a row, a tile's together, are cut
// into as many equal stretches as there are blocks; a block is a cube core and its two vector cores. The part of a tile
// that lies in a stretch is a run. A run that is not its whole tile leaves its sums, unnormalised, in the workspace,
// and after a barrier of all vector cores these are combined. Cutting tiles wherever a stretch ends keeps every core
// busy to within a unit: 16 tiles of 32 units on 24 cores take 22 units' time instead of 32.
//
// Pipeline, for each unit i of a stretch; the slots lie in global memory, which in effect is the L2 cache:
//
//    cube    QK: S = Q Kᵀ ──────┐           PV: O = P V ──────┐
//                 fp32, slot i%4 │ S_READY        fp32, i%4    │ O_READY
//                               ▼           ▲                 ▼
//    vector          softmax: P = exp(scale (S − m)) ─┘ P_READY    sum: out = out · exp(scale (m' − m)) + O
//                                     fp16, slot i%4
//
//    cube issues     QK 0  QK 1  QK 2 │ QK 3  PV 0 │ QK 4  PV 1 │ …
//    vector issues   SM 0  SM 1  SM 2 │ SM 3  Σ 0  │ SM 4  Σ 1  │ …       AHEAD = 3 units, SLOTS = 4
//
// Flags between cores, each counted up once a unit by one side and down once a unit by the other:
//    S_READY, O_READY   by FIX of the cube core once the tile is stored; each vector core waits on its own count
//    P_READY            by MTE3 of both vector cores; the cube core's count rises when both have set it
//    PARTS_READY        by MTE3 of all vector cores, waited for by all: the barrier before combining
// None says that a slot is free, because the order of the stages does, with SLOTS > AHEAD: QK i, which overwrites S
// i − 4, is issued after the wait for P i − 4, which came after the vector cores had read that S. Likewise SM i after
// the wait for O i − 4, whose product had read P i − 4, and PV i after the wait for P i, whose softmax comes after Σ
// i − 4 in the vector pipe, which had read O i − 4. Runs do not matter to this: the stream of units goes on over them.
//
// Cube core. L1: Q × 2, K × 3, P with V × 3, of 128 rows or keys each. L0A and L0B: two halves, L0C: two halves.
//    MTE2 → MTE1  0-2 K is loaded (and Q), 3-5 P and V are         MTE1 → MTE2  the same are free; 6-7 Q is
//    MTE1 → M     0-1 L0A and L0B are loaded                       M → MTE1     they are free
//    M → FIX      0-1 a half of L0C is summed                      FIX → M      it is free
// Vector core, with 64 of the 128 rows. Unified buffer: two tiles of 32 KiB for what is loaded (S in slices of 8192
// numbers, then O), two of P, one of sums, one as mask or scratch, and columns of 64 numbers of the last 8 units: the
// largest score m, the sum of weights l, and a, the factor of what was summed before.
//    MTE2 → V     0-1 a loaded tile is there                       V → MTE2     it is free
//    V → MTE3     0-1 a tile of P is there, 2 the sums are         MTE3 → V     they are stored, and free

#include <cstdint>
#include <pto/pto-inst.hpp>
#if !defined(__CPU_SIM) && !defined(__COSTMODEL)
#include "runtime/rt.h"
#endif

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef KEYS
#define KEYS 256
#endif
#ifndef OUT_FP32
#define OUT_FP32 0
#endif

namespace {

constexpr int ROWS = 128, D = HEAD_DIM, UNIT = KEYS;
constexpr int CHUNK = 128;  // keys of one product: L0A, L0B and L0C hold two of 128 × 128 × 128
constexpr int SLOTS = 4, AHEAD = 3;
constexpr int MAX_BLOCKS = 32;  // rows of the combination's tables
static_assert(D == 64 || D == 128, "HEAD_DIM is 64 or 128");
static_assert(UNIT == 128 || UNIT == 256, "KEYS is 128 or 256");

// The workspace, in bytes: for each block its slots of S, P and O, and the parts of two runs: a stretch has no more
// than two runs that are not whole. What begins a tile lies in the block's second part, what goes on with one in its
// first, so that the parts of one tile lie one after the other, two apart.
constexpr int64_t S_BYTES = ROWS * UNIT * 4, P_BYTES = ROWS * UNIT * 2, O_BYTES = ROWS * D * 4;
constexpr int64_t P_AT = SLOTS * S_BYTES, O_AT = P_AT + SLOTS * P_BYTES, PARTS_AT = O_AT + SLOTS * O_BYTES;
constexpr int64_t STATS_AT = O_BYTES, PART_BYTES = O_BYTES + 2 * ROWS * 4;  // the sums, then m, then l
constexpr int64_t BLOCK_BYTES = PARTS_AT + 2 * PART_BYTES;

}  // namespace

#if defined(__DAV_CUBE__) || defined(__DAV_VEC__) || defined(__CPU_SIM) || defined(__COSTMODEL)
using namespace pto;

namespace {

using Out = std::conditional_t<OUT_FP32 == 1, float, half>;

enum Flag : uint16_t { S_READY, P_READY, O_READY, PARTS_READY };
constexpr uint16_t ALL_OF_A_KIND = 0, BLOCK = 2;  // who takes part in a flag: all vector cores, or a block's cores

struct Arguments {
    __gm__ uint8_t *q, *k, *v, *out, *workspace;
    int heads, heads_q, heads_kv, seqlen_q, seqlen_k, causal, blocks;  // heads: batch · heads_q
    float scale;
};

// A flag is set when what its pipe was given before is done. 1: by this much its count rises.
AICORE inline void set_core_flag(pipe_t pipe, uint16_t who, uint16_t flag) {
    ffts_cross_core_sync(pipe, 1 | who << 4 | flag << 8);
}

AICORE inline int smaller(int a, int b) { return a < b ? a : b; }
AICORE inline int larger(int a, int b) { return a > b ? a : b; }

// How the units are laid out and cut.
struct Plan {
    const Arguments& args;
    int tiles;    // of a head
    int units;    // of a head
    int64_t all;  // units
    int blocks;   // that have a unit; those after them are idle

    AICORE explicit Plan(const Arguments& arguments) : args(arguments), tiles(arguments.seqlen_q / ROWS), units(0) {
        if (args.causal)
            for (int tile = 0; tile < tiles; ++tile) units += units_of(tile);
        else
            units = tiles * units_of(0);
        all = int64_t(units) * args.heads;
        blocks = all < args.blocks ? int(all) : args.blocks;
    }

    // Keys before this one are all that a tile's last query sees; at least one unit, which then is all hidden.
    AICORE int units_of(int tile) const {
        const int seen = args.causal ? (tile + 1) * ROWS + args.seqlen_k - args.seqlen_q : args.seqlen_k;
        return larger((smaller(seen, args.seqlen_k) + UNIT - 1) / UNIT, 1);
    }

    AICORE int64_t begin(int block) const { return all * smaller(block, blocks) / blocks; }
};

// A unit of work, and the way to the next.
struct Unit {
    int64_t at;     // among all units
    int64_t first;  // of its tile
    int head, tile, count;  // count: units of its tile

    AICORE Unit(const Plan& plan, int64_t at) : at(at), head(at / plan.units), tile(0) {
        first = int64_t(head) * plan.units;
        count = plan.units_of(0);
        if (!plan.args.causal) {
            tile = (at - first) / count;
            first += int64_t(tile) * count;
            return;
        }
        while (first + count <= at) step(plan);
    }

    AICORE int index() const { return at - first; }
    AICORE bool last_of_tile() const { return at + 1 == first + count; }

    AICORE void next(const Plan& plan) {
        if (last_of_tile()) step(plan);
        ++at;
    }

    AICORE int64_t head_kv(const Arguments& args) const {
        return int64_t(head / args.heads_q) * args.heads_kv + head % args.heads_q / (args.heads_q / args.heads_kv);
    }

    AICORE int64_t row(const Arguments& args) const { return int64_t(head) * args.seqlen_q + tile * ROWS; }

  private:
    AICORE void step(const Plan& plan) {
        first += count;
        if (++tile == plan.tiles) {
            tile = 0;
            ++head;
        }
        count = plan.units_of(tile);
    }
};

// Counts round: 0, 1, … size − 1, 0, …
template <int size>
struct Ring {
    int at;
    AICORE Ring() : at(0) {}
    AICORE int take() {
        const int taken = at;
        at = at + 1 == size ? 0 : at + 1;
        return taken;
    }
};

// Rows in global memory, one after the other or further apart.
template <typename T, int rows, int columns, int stride = columns>
using Memory = GlobalTensor<T, Shape<1, 1, 1, rows, columns>,
                            Stride<rows * stride, rows * stride, rows * stride, stride, 1>>;

// ---- the cube core ----------------------------------------------------------------------------------------------

#if defined(__DAV_CUBE__) || defined(__CPU_SIM) || defined(__COSTMODEL)
constexpr int K_BUFFERS = 3, PV_BUFFERS = 3;
constexpr int K_FLAG = 0, PV_FLAG = K_BUFFERS, Q_FLAG = K_BUFFERS + PV_BUFFERS;
constexpr uint32_t Q_L1 = 0, Q_SIZE = ROWS * D * 2, K_L1 = Q_L1 + 2 * Q_SIZE, K_SIZE = CHUNK * D * 2;
constexpr uint32_t P_L1 = K_L1 + K_BUFFERS * K_SIZE, P_SIZE = ROWS * CHUNK * 2;
constexpr uint32_t V_L1 = P_L1 + PV_BUFFERS * P_SIZE, V_SIZE = CHUNK * D * 2;
static_assert(V_L1 + PV_BUFFERS * V_SIZE <= 512 * 1024, "L1 has 512 KiB");
constexpr uint32_t L0_HALF = 32 * 1024, L0C_HALF = 64 * 1024;

// As rows of 16 × 16 blocks, which is how the cube reads its left operand and, K aside, its right one.
template <int rows, int columns>
using Blocks = Tile<TileType::Mat, half, rows, columns, BLayout::ColMajor, rows, columns, SLayout::RowMajor, 512>;
using Queries = Blocks<ROWS, D>;
using Weights = Blocks<ROWS, CHUNK>;
using Values = Blocks<CHUNK, D>;
// K lies key by key, and is read as D rows of CHUNK keys.
using KeysTransposed =
    Tile<TileType::Mat, half, D, CHUNK, BLayout::RowMajor, D, CHUNK, SLayout::ColMajor, 512>;
using KeysMemory =
    GlobalTensor<half, Shape<1, 1, 1, D, CHUNK>, Stride<D * CHUNK, D * CHUNK, D * CHUNK, 1, D>, Layout::DN>;

class Cube {
  public:
    AICORE Cube(const Arguments& args, const Plan& plan, int block)
        : args_(args),
          plan_(plan),
          slots_(args.workspace + block * BLOCK_BYTES),
          begin_(plan.begin(block)),
          end_(plan.begin(block + 1)),
          queries_in_(0) {}

    AICORE void run() {
        for (int flag = 0; flag < Q_FLAG + 2; ++flag) set_flag(PIPE_MTE1, PIPE_MTE2, event_t(flag));
        for (int half_ = 0; half_ < 2; ++half_) {
            set_flag(PIPE_M, PIPE_MTE1, event_t(half_));
            set_flag(PIPE_FIX, PIPE_M, event_t(half_));
        }
        Unit ahead(plan_, begin_), unit(plan_, begin_);
        for (int64_t at = begin_ - AHEAD; at < end_; ++at) {
            if (ahead.at < end_) {
                queries_times_keys(ahead);
                ahead.next(plan_);
            }
            if (at >= begin_) {
                weights_times_values(unit);
                unit.next(plan_);
            }
        }
        for (int flag = 0; flag < Q_FLAG + 2; ++flag) wait_flag(PIPE_MTE1, PIPE_MTE2, event_t(flag));
        for (int half_ = 0; half_ < 2; ++half_) {
            wait_flag(PIPE_M, PIPE_MTE1, event_t(half_));
            wait_flag(PIPE_FIX, PIPE_M, event_t(half_));
        }
        pipe_barrier(PIPE_ALL);
    }

  private:
    AICORE void queries_times_keys(const Unit& unit) {
        if (unit.at == begin_ || unit.index() == 0) {  // another tile's queries
            queries_in_ = queries_next_.take();
            Queries queries;
            TASSIGN(queries, Q_L1 + queries_in_ * Q_SIZE);
            Memory<half, ROWS, D> memory((__gm__ half*)args_.q + unit.row(args_) * D);
            wait_flag(PIPE_MTE1, PIPE_MTE2, event_t(Q_FLAG + queries_in_));
            TLOAD(queries, memory);
        }
        Queries queries;
        TASSIGN(queries, Q_L1 + queries_in_ * Q_SIZE);
        const int64_t key = unit.head_kv(args_) * args_.seqlen_k + int64_t(unit.index()) * UNIT;
        __gm__ float* scores = (__gm__ float*)(slots_ + (unit.at - begin_) % SLOTS * S_BYTES);
        for (int chunk = 0; chunk < UNIT / CHUNK; ++chunk) {
            const int in = keys_next_.take();
            KeysTransposed keys;
            TASSIGN(keys, K_L1 + in * K_SIZE);
            KeysMemory memory((__gm__ half*)args_.k + (key + chunk * CHUNK) * D);
            wait_flag(PIPE_MTE1, PIPE_MTE2, event_t(K_FLAG + in));
            TLOAD(keys, memory);
            set_flag(PIPE_MTE2, PIPE_MTE1, event_t(K_FLAG + in));
            wait_flag(PIPE_MTE2, PIPE_MTE1, event_t(K_FLAG + in));
            const int sum = sums_next_.take();
            wait_flag(PIPE_FIX, PIPE_M, event_t(sum));
            multiply<D, CHUNK>(queries, keys, sum, false);
            set_flag(PIPE_MTE1, PIPE_MTE2, event_t(K_FLAG + in));
            store<CHUNK, UNIT>(sum, scores + chunk * CHUNK);
        }
        if (unit.last_of_tile() || unit.at + 1 == end_) set_flag(PIPE_MTE1, PIPE_MTE2, event_t(Q_FLAG + queries_in_));
        set_core_flag(PIPE_FIX, BLOCK, S_READY);
    }

    AICORE void weights_times_values(const Unit& unit) {
        const int64_t key = unit.head_kv(args_) * args_.seqlen_k + int64_t(unit.index()) * UNIT;
        const int slot = (unit.at - begin_) % SLOTS;
        __gm__ half* from = (__gm__ half*)(slots_ + P_AT + slot * P_BYTES);
        const int sum = sums_next_.take();
        for (int chunk = 0; chunk < UNIT / CHUNK; ++chunk) {
            const int in = values_next_.take();
            Values values;
            TASSIGN(values, V_L1 + in * V_SIZE);
            Memory<half, CHUNK, D> values_memory((__gm__ half*)args_.v + (key + chunk * CHUNK) * D);
            wait_flag(PIPE_MTE1, PIPE_MTE2, event_t(PV_FLAG + in));
            TLOAD(values, values_memory);  // before the wait, which holds up all that is issued after it
            if (chunk == 0) wait_flag_dev(P_READY);
            Weights weights;
            TASSIGN(weights, P_L1 + in * P_SIZE);
            Memory<half, ROWS, CHUNK, UNIT> weights_memory(from + chunk * CHUNK);
            TLOAD(weights, weights_memory);
            set_flag(PIPE_MTE2, PIPE_MTE1, event_t(PV_FLAG + in));
            wait_flag(PIPE_MTE2, PIPE_MTE1, event_t(PV_FLAG + in));
            if (chunk == 0) wait_flag(PIPE_FIX, PIPE_M, event_t(sum));
            multiply<CHUNK, D>(weights, values, sum, chunk > 0);
            set_flag(PIPE_MTE1, PIPE_MTE2, event_t(PV_FLAG + in));
        }
        store<D, D>(sum, (__gm__ float*)(slots_ + O_AT + slot * O_BYTES));
        set_core_flag(PIPE_FIX, BLOCK, O_READY);
    }

    // ROWS × inner by inner × columns, into a half of L0C or added to what is there.
    template <int inner, int columns, typename Left, typename Right>
    AICORE void multiply(Left& left_l1, Right& right_l1, int sum, bool add) {
        const int in = operands_next_.take();
        TileLeft<half, ROWS, inner> left;
        TileRight<half, inner, columns> right;
        TileAcc<float, ROWS, columns> product;
        TASSIGN(left, in * L0_HALF);
        TASSIGN(right, in * L0_HALF);
        TASSIGN(product, sum * L0C_HALF);
        wait_flag(PIPE_M, PIPE_MTE1, event_t(in));
        TEXTRACT(left, left_l1, 0, 0);
        TEXTRACT(right, right_l1, 0, 0);
        set_flag(PIPE_MTE1, PIPE_M, event_t(in));
        wait_flag(PIPE_MTE1, PIPE_M, event_t(in));
        if (add)
            TMATMUL_ACC(product, product, left, right);
        else
            TMATMUL(product, left, right);
        set_flag(PIPE_M, PIPE_MTE1, event_t(in));
    }

    template <int columns, int stride>
    AICORE void store(int sum, __gm__ float* to) {
        TileAcc<float, ROWS, columns> product;
        TASSIGN(product, sum * L0C_HALF);
        Memory<float, ROWS, columns, stride> memory(to);
        set_flag(PIPE_M, PIPE_FIX, event_t(sum));
        wait_flag(PIPE_M, PIPE_FIX, event_t(sum));
        TSTORE(memory, product);
        set_flag(PIPE_FIX, PIPE_M, event_t(sum));
    }

    const Arguments& args_;
    const Plan& plan_;
    __gm__ uint8_t* slots_;
    const int64_t begin_, end_;
    int queries_in_;
    Ring<2> queries_next_, operands_next_, sums_next_;
    Ring<K_BUFFERS> keys_next_;
    Ring<PV_BUFFERS> values_next_;
};
#endif

// ---- the vector cores -------------------------------------------------------------------------------------------

#if defined(__DAV_VEC__) || defined(__CPU_SIM) || defined(__COSTMODEL)
constexpr int HALF_ROWS = ROWS / 2;           // of a tile, for each of the two vector cores
constexpr int SLICE = 32 * 1024 / 4 / UNIT;   // rows whose scores fill 32 KiB
constexpr int HISTORY = 8;                    // units whose columns are kept: more than AHEAD + 2
constexpr int SUMS_FLAG = 2;
constexpr float HIDDEN = -1e37f;   // added to a hidden score: far below any, and times the scale still finite
constexpr float SMALLEST = -1e30f; // what m starts from, so that hidden scores are far below it, too
constexpr float TINY = 1e-30f;     // for the sum of no weights: 0 / TINY = 0

// Bytes of the unified buffer. The library's instructions use what is above 184 KiB themselves.
constexpr uint32_t TILE = 32 * 1024, LOADED = 0, P_UB = 2 * TILE, SUMS = 3 * TILE, SCRATCH = 4 * TILE;
constexpr uint32_t COLUMN = HALF_ROWS * 4, M_AT = 5 * TILE, L_AT = M_AT + HISTORY * COLUMN;
constexpr uint32_t A_AT = L_AT + HISTORY * COLUMN, SPARE = A_AT + HISTORY * COLUMN;
static_assert(SPARE + COLUMN <= 184 * 1024, "the unified buffer has 184 KiB for us");
static_assert(HALF_ROWS * D * 2 <= TILE / 2, "half a tile of sums, in fp16, fits into one of P");

template <typename T, int rows, int columns>
using Rows = Tile<TileType::Vec, T, rows, columns, BLayout::RowMajor, rows, columns>;
// One number a row: as a reduction leaves it and an expansion takes it, and as a row to calculate with.
template <int rows>
using Column = Tile<TileType::Vec, float, rows, 1, BLayout::ColMajor, rows, 1>;
template <int rows>
using Line = Rows<float, 1, rows>;

class Vector {
  public:
    AICORE Vector(const Arguments& args, const Plan& plan, int block, int half_)
        : args_(args),
          plan_(plan),
          slots_(args.workspace + block * BLOCK_BYTES),
          block_(block),
          half_(half_),
          begin_(plan.begin(block)),
          end_(plan.begin(block + 1)) {}

    AICORE void run() {
        set_mask_norm();
        set_vector_mask(-1, -1);
        for (int buffer = 0; buffer < 2; ++buffer) set_flag(PIPE_V, PIPE_MTE2, event_t(buffer));
        for (int flag = 0; flag <= SUMS_FLAG; ++flag) set_flag(PIPE_MTE3, PIPE_V, event_t(flag));
        Unit ahead(plan_, begin_), unit(plan_, begin_);
        for (int64_t at = begin_ - AHEAD; at < end_; ++at) {
            if (ahead.at < end_) {
                softmax(ahead);
                ahead.next(plan_);
            }
            if (at >= begin_) {
                sum(unit);
                unit.next(plan_);
            }
        }
        for (int buffer = 0; buffer < 2; ++buffer) wait_flag(PIPE_V, PIPE_MTE2, event_t(buffer));
        for (int flag = 0; flag <= SUMS_FLAG; ++flag) wait_flag(PIPE_MTE3, PIPE_V, event_t(flag));
        pipe_barrier(PIPE_ALL);
        combine();
    }

  private:
    AICORE bool first_of_run(const Unit& unit) const { return unit.at == begin_ || unit.index() == 0; }
    AICORE bool last_of_run(const Unit& unit) const { return unit.at + 1 == end_ || unit.last_of_tile(); }

    AICORE void softmax(const Unit& unit) {
        const int slot = (unit.at - begin_) % SLOTS;
        wait_flag_dev(S_READY);
        for (int slice = 0; slice < HALF_ROWS / SLICE; ++slice) {
            const int row = half_ * HALF_ROWS + slice * SLICE;
            const int in = loaded_next_.take(), to = weights_next_.take();
            Rows<float, SLICE, UNIT> scores;
            Rows<half, SLICE, UNIT> weights;
            TASSIGN(scores, LOADED + in * TILE);
            TASSIGN(weights, P_UB + to * TILE / 2);
            Memory<float, SLICE, UNIT> from((__gm__ float*)(slots_ + slot * S_BYTES) + row * UNIT);
            wait_flag(PIPE_V, PIPE_MTE2, event_t(in));
            TLOAD(scores, from);
            set_flag(PIPE_MTE2, PIPE_V, event_t(in));
            wait_flag(PIPE_MTE2, PIPE_V, event_t(in));
            if (args_.causal) hide(scores, unit, row);
            wait_flag(PIPE_MTE3, PIPE_V, event_t(to));
            weigh(scores, weights, unit, slice);
            set_flag(PIPE_V, PIPE_MTE2, event_t(in));
            set_flag(PIPE_V, PIPE_MTE3, event_t(to));
            wait_flag(PIPE_V, PIPE_MTE3, event_t(to));
            Memory<half, SLICE, UNIT> memory((__gm__ half*)(slots_ + P_AT + slot * P_BYTES) + row * UNIT);
            TSTORE(memory, weights);
            set_flag(PIPE_MTE3, PIPE_V, event_t(to));
        }
        set_core_flag(PIPE_MTE3, BLOCK, P_READY);
    }

    // A query sees the keys up to its own, counted from the ends.
    AICORE void hide(Rows<float, SLICE, UNIT>& scores, const Unit& unit, int row) {
        const int last_seen = unit.tile * ROWS + row + args_.seqlen_k - args_.seqlen_q - unit.index() * UNIT;
        if (last_seen >= UNIT - 1) return;  // the first row's, and later rows see more
        Rows<float, SLICE, UNIT> mask;
        TASSIGN(mask, SCRATCH);
        TTRI<Rows<float, SLICE, UNIT>, 1>(mask, last_seen + 1);
        pipe_barrier(PIPE_V);
        TMULS(mask, mask, HIDDEN);
        pipe_barrier(PIPE_V);
        TADD(scores, scores, mask);
        pipe_barrier(PIPE_V);
    }

    AICORE uint32_t column(uint32_t which, int64_t unit, int row = 0) const {
        return which + (unit - begin_) % HISTORY * COLUMN + row * 4;
    }

    AICORE void weigh(Rows<float, SLICE, UNIT>& scores, Rows<half, SLICE, UNIT>& weights, const Unit& unit, int slice) {
        const int row = slice * SLICE;
        const bool first = first_of_run(unit);
        Rows<float, SLICE, UNIT> scratch;
        Column<SLICE> largest, largest_now, total_now;
        Line<SLICE> largest_line, m, m_before, a, l, l_before;
        TASSIGN(scratch, SCRATCH);
        TASSIGN(largest, SPARE);
        TASSIGN(largest_line, SPARE);
        TASSIGN(m, column(M_AT, unit.at, row));
        TASSIGN(largest_now, column(M_AT, unit.at, row));
        TASSIGN(l, column(L_AT, unit.at, row));
        TASSIGN(total_now, column(L_AT, unit.at, row));
        TASSIGN(a, column(A_AT, unit.at, row));
        if (!first) {
            TASSIGN(m_before, column(M_AT, unit.at - 1, row));
            TASSIGN(l_before, column(L_AT, unit.at - 1, row));
        }

        TROWMAX(largest, scores, scratch);
        pipe_barrier(PIPE_V);
        if (first)
            TMAXS(m, largest_line, SMALLEST);
        else
            TMAX(m, largest_line, m_before);
        pipe_barrier(PIPE_V);
        TROWEXPANDSUB(scores, scores, largest_now);
        if (!first) TSUB(a, m_before, m);
        pipe_barrier(PIPE_V);
        TMULS(scores, scores, args_.scale);
        if (!first) TMULS(a, a, args_.scale);
        pipe_barrier(PIPE_V);
        TEXP(scores, scores);
        if (!first) TEXP(a, a);
        pipe_barrier(PIPE_V);
        TCVT(weights, scores, RoundMode::CAST_RINT);
        TROWSUM(total_now, scores, scratch);
        if (!first) {
            TMUL(largest_line, a, l_before);
            pipe_barrier(PIPE_V);
            TADD(l, l, largest_line);
        }
        pipe_barrier(PIPE_V);
    }

    AICORE void sum(const Unit& unit) {
        const int in = loaded_next_.take();
        Rows<float, HALF_ROWS, D> product, sums;
        TASSIGN(product, LOADED + in * TILE);
        TASSIGN(sums, SUMS);
        Memory<float, HALF_ROWS, D> from((__gm__ float*)(slots_ + O_AT + (unit.at - begin_) % SLOTS * O_BYTES) +
                                         half_ * HALF_ROWS * D);
        wait_flag_dev(O_READY);
        wait_flag(PIPE_V, PIPE_MTE2, event_t(in));
        TLOAD(product, from);
        set_flag(PIPE_MTE2, PIPE_V, event_t(in));
        wait_flag(PIPE_MTE2, PIPE_V, event_t(in));
        if (first_of_run(unit)) {
            wait_flag(PIPE_MTE3, PIPE_V, event_t(SUMS_FLAG));
            TMULS(sums, product, 1.0f);
        } else {
            Column<HALF_ROWS> a;
            TASSIGN(a, column(A_AT, unit.at));
            TROWEXPANDMUL(sums, sums, a);
            pipe_barrier(PIPE_V);
            TADD(sums, sums, product);
        }
        pipe_barrier(PIPE_V);
        set_flag(PIPE_V, PIPE_MTE2, event_t(in));
        if (!last_of_run(unit)) return;
        if (begin_ <= unit.first && unit.last_of_tile())
            finish(unit);
        else
            put_by(unit);
        set_flag(PIPE_MTE3, PIPE_V, event_t(SUMS_FLAG));
    }

    AICORE void finish(const Unit& unit) {
        Rows<float, HALF_ROWS, D> sums;
        Line<HALF_ROWS> l, total_line;
        Column<HALF_ROWS> total;
        TASSIGN(sums, SUMS);
        TASSIGN(l, column(L_AT, unit.at));
        TASSIGN(total, SPARE);
        TASSIGN(total_line, SPARE);
        TMAXS(total_line, l, TINY);
        pipe_barrier(PIPE_V);
        TROWEXPANDDIV(sums, sums, total);
        pipe_barrier(PIPE_V);
        const int64_t row = unit.row(args_) + half_ * HALF_ROWS;
        const int to = weights_next_.take();
        wait_flag(PIPE_MTE3, PIPE_V, event_t(to));
        write<HALF_ROWS>(sums, P_UB + to * TILE / 2, row, to);
        set_flag(PIPE_MTE3, PIPE_V, event_t(to));
    }

    // Store finished rows of the output, fp16 by way of a buffer.
    template <int rows>
    AICORE void write(Rows<float, rows, D>& sums, uint32_t buffer, int64_t row, int flag) {
        Memory<Out, rows, D> memory((__gm__ Out*)args_.out + row * D);
        if constexpr (OUT_FP32 == 1) {
            set_flag(PIPE_V, PIPE_MTE3, event_t(flag));
            wait_flag(PIPE_V, PIPE_MTE3, event_t(flag));
            TSTORE(memory, sums);
        } else {
            Rows<half, rows, D> rounded;
            TASSIGN(rounded, buffer);
            TCVT(rounded, sums, RoundMode::CAST_RINT);
            set_flag(PIPE_V, PIPE_MTE3, event_t(flag));
            wait_flag(PIPE_V, PIPE_MTE3, event_t(flag));
            TSTORE(memory, rounded);
        }
    }

    AICORE __gm__ uint8_t* part(int block, bool begins) const {
        return args_.workspace + block * BLOCK_BYTES + PARTS_AT + (begins ? PART_BYTES : 0);
    }

    // Leave the sums, m and l of a run that is not all of its tile.
    AICORE void put_by(const Unit& unit) {
        Rows<float, HALF_ROWS, D> sums;
        Line<HALF_ROWS> m, l;
        TASSIGN(sums, SUMS);
        TASSIGN(m, column(M_AT, unit.at));
        TASSIGN(l, column(L_AT, unit.at));
        __gm__ uint8_t* to = part(block_, begin_ <= unit.first);
        Memory<float, HALF_ROWS, D> sums_memory((__gm__ float*)to + half_ * HALF_ROWS * D);
        Memory<float, 1, HALF_ROWS> m_memory((__gm__ float*)(to + STATS_AT) + half_ * HALF_ROWS);
        Memory<float, 1, HALF_ROWS> l_memory((__gm__ float*)(to + STATS_AT) + ROWS + half_ * HALF_ROWS);
        set_flag(PIPE_V, PIPE_MTE3, event_t(SUMS_FLAG));
        wait_flag(PIPE_V, PIPE_MTE3, event_t(SUMS_FLAG));
        TSTORE(sums_memory, sums);
        TSTORE(m_memory, m);
        TSTORE(l_memory, l);
    }

    // The tiles that lie in more than one stretch are shared out among all vector cores, some rows at a time: few rows
    // where there are few such tiles, so that they occupy all cores.
    AICORE void combine() {
        int split = 0;
        for (int block = 1; block < plan_.blocks; ++block) split += begins_split_tile(block);
        if (split == 0) return;
        set_core_flag(PIPE_MTE3, ALL_OF_A_KIND, PARTS_READY);
        wait_flag_dev(PARTS_READY);
        if (split <= 6)
            combine_tiles<8>();
        else if (split <= 12)
            combine_tiles<32>();
        else
            combine_tiles<64>();
    }

    // Whether a stretch is the first to begin within some tile: each split tile has one such.
    AICORE bool begins_split_tile(int block) const {
        const Unit unit(plan_, plan_.begin(block));
        return plan_.begin(block) > unit.first && plan_.begin(block - 1) <= unit.first;
    }

    template <int rows>
    AICORE void combine_tiles() {
        const int cores = 2 * args_.blocks, core = 2 * block_ + half_;
        int piece = 0;
        for (int block = 1; block < plan_.blocks; ++block) {
            if (!begins_split_tile(block)) continue;
            const Unit unit(plan_, plan_.begin(block));
            int end = block + 1;  // of the stretches that the tile lies in
            while (end < plan_.blocks && plan_.begin(end) < unit.first + unit.count) ++end;
            for (int row = 0; row < ROWS; row += rows, ++piece)
                if (piece % cores == core) combine_rows<rows>(unit, block - 1, end - block + 1, row);
        }
    }

    // Bytes of the unified buffer while combining: tables of MAX_BLOCKS × rows, then a batch of parts, all at once in
    // one tile, a part's rows after another's.
    template <int rows>
    AICORE void combine_rows(const Unit& unit, int block, int parts, int row) {
        constexpr int BATCH = rows == 8 ? MAX_BLOCKS : 128 / rows;  // parts
        constexpr uint32_t TABLE = MAX_BLOCKS * rows * 4, ROWS_BYTES = rows * D * 4;
        constexpr uint32_t M_TABLE = 0, L_TABLE = TABLE, TABLE_SCRATCH = 2 * TABLE, M = 3 * TABLE, L = M + rows * 4;
        constexpr uint32_t PARTS = L + rows * 4, TOTAL = PARTS + BATCH * ROWS_BYTES, ROUNDED = TOTAL + ROWS_BYTES;
        static_assert(ROUNDED + ROWS_BYTES / 2 <= 184 * 1024, "the unified buffer has 184 KiB for us");
        using Table = Tile<TileType::Vec, float, MAX_BLOCKS, rows, BLayout::RowMajor, DYNAMIC, rows>;
        using Rest = Tile<TileType::Vec, float, MAX_BLOCKS - 1, rows, BLayout::RowMajor, DYNAMIC, rows>;
        using Stats = GlobalTensor<float, Shape<1, 1, 1, DYNAMIC, rows>, Stride<1, 1, 1, BLOCK_BYTES / 4, 1>>;
        using Some = Tile<TileType::Vec, float, BATCH * rows, D, BLayout::RowMajor, DYNAMIC, D>;
        using Factors = Tile<TileType::Vec, float, BATCH * rows, 1, BLayout::ColMajor, DYNAMIC, 1>;
        Table m_table(parts), l_table(parts), scratch(parts);
        Line<rows> m, l, first_m, first_l;
        Column<rows> l_column;
        Rows<float, rows, D> total, first;
        TASSIGN(m_table, M_TABLE);
        TASSIGN(l_table, L_TABLE);
        TASSIGN(scratch, TABLE_SCRATCH);
        TASSIGN(m, M);
        TASSIGN(l, L);
        TASSIGN(l_column, L);
        TASSIGN(total, TOTAL);
        TASSIGN(first, PARTS);

        // The first part begins the tile, the others go on with it.
        Rest m_rest(parts - 1), l_rest(parts - 1);
        TASSIGN(first_m, M_TABLE);
        TASSIGN(first_l, L_TABLE);
        TASSIGN(m_rest, M_TABLE + rows * 4);
        TASSIGN(l_rest, L_TABLE + rows * 4);
        __gm__ float* begins = (__gm__ float*)(part(block, true) + STATS_AT) + row;
        __gm__ float* goes_on = (__gm__ float*)(part(block + 1, false) + STATS_AT) + row;
        Memory<float, 1, rows> first_m_memory(begins), first_l_memory(begins + ROWS);
        Stats m_memory(goes_on, Shape<1, 1, 1, DYNAMIC, rows>(parts - 1)),
            l_memory(goes_on + ROWS, Shape<1, 1, 1, DYNAMIC, rows>(parts - 1));
        pipe_barrier(PIPE_ALL);  // the piece before has been stored
        TLOAD(first_m, first_m_memory);
        TLOAD(first_l, first_l_memory);
        TLOAD(m_rest, m_memory);
        TLOAD(l_rest, l_memory);
        set_flag(PIPE_MTE2, PIPE_V, EVENT_ID0);
        Memory<float, rows, D> first_memory((__gm__ float*)part(block, true) + row * D);
        TLOAD(first, first_memory);
        load_parts<rows, BATCH - 1>(block + 1, smaller(parts, BATCH) - 1, row, PARTS + ROWS_BYTES);
        set_flag(PIPE_MTE2, PIPE_V, EVENT_ID1);

        wait_flag(PIPE_MTE2, PIPE_V, EVENT_ID0);
        TCOLMAX(m, m_table);
        pipe_barrier(PIPE_V);
        TCOLEXPANDSUB(m_table, m_table, m);
        pipe_barrier(PIPE_V);
        TMULS(m_table, m_table, args_.scale);
        pipe_barrier(PIPE_V);
        TEXP(m_table, m_table);
        pipe_barrier(PIPE_V);
        TMUL(l_table, l_table, m_table);
        pipe_barrier(PIPE_V);
        TCOLSUM(l, l_table, scratch, false);  // at least 1: every query of a split tile sees a key
        TEXPANDS(total, 0.0f);

        for (int begin = 0; begin < parts; begin += BATCH) {
            int count = smaller(parts - begin, BATCH);
            if (begin > 0) {
                set_flag(PIPE_V, PIPE_MTE2, EVENT_ID0);
                wait_flag(PIPE_V, PIPE_MTE2, EVENT_ID0);
                load_parts<rows, BATCH>(block + begin, count, row, PARTS);
                set_flag(PIPE_MTE2, PIPE_V, EVENT_ID1);
            }
            wait_flag(PIPE_MTE2, PIPE_V, EVENT_ID1);
            Some all(count * rows);
            Factors factors(count * rows);
            TASSIGN(all, PARTS);
            TASSIGN(factors, M_TABLE + begin * rows * 4);
            TROWEXPANDMUL(all, all, factors);
            pipe_barrier(PIPE_V);
            while (count > 1) {  // the last half onto the first
                const int half_count = count / 2;
                count -= half_count;
                Some onto(half_count * rows), last(half_count * rows);
                TASSIGN(onto, PARTS);
                TASSIGN(last, PARTS + count * ROWS_BYTES);
                TADD(onto, onto, last);
                pipe_barrier(PIPE_V);
            }
            TADD(total, total, first);
            pipe_barrier(PIPE_V);
        }
        TROWEXPANDDIV(total, total, l_column);
        pipe_barrier(PIPE_V);
        write<rows>(total, ROUNDED, unit.row(args_) + row, 0);
    }

    // Some rows of the sums of parts that go on with a tile, one part's after another's; no more parts than `most`.
    template <int rows, int most>
    AICORE void load_parts(int block, int count, int row, uint32_t to) {
        if (count == 0) return;
        Tile<TileType::Vec, float, most * rows, D, BLayout::RowMajor, DYNAMIC, D> sums(count * rows);
        TASSIGN(sums, to);
        GlobalTensor<float, Shape<1, 1, DYNAMIC, rows, D>, Stride<1, 1, BLOCK_BYTES / 4, D, 1>> memory(
            (__gm__ float*)part(block, false) + row * D, Shape<1, 1, DYNAMIC, rows, D>(count));
        TLOAD(sums, memory);
    }

    const Arguments& args_;
    const Plan& plan_;
    __gm__ uint8_t* slots_;
    const int block_, half_;
    const int64_t begin_, end_;
    Ring<2> loaded_next_, weights_next_;
};
#endif

}  // namespace
#endif

__global__ AICORE void flash_attention(__gm__ void* ffts, __gm__ void* q, __gm__ void* k, __gm__ void* v,
                                       __gm__ void* out, __gm__ void* workspace, int heads, int heads_q, int heads_kv,
                                       int seqlen_q, int seqlen_k, int causal, int blocks, float scale) {
#if defined(__DAV_CUBE__) || defined(__DAV_VEC__) || defined(__CPU_SIM) || defined(__COSTMODEL)
    set_ffts_base_addr((uint64_t)ffts);
    const Arguments args{(__gm__ uint8_t*)q,
                         (__gm__ uint8_t*)k,
                         (__gm__ uint8_t*)v,
                         (__gm__ uint8_t*)out,
                         (__gm__ uint8_t*)workspace,
                         heads,
                         heads_q,
                         heads_kv,
                         seqlen_q,
                         seqlen_k,
                         causal,
                         blocks,
                         scale};
    const Plan plan(args);
#endif
#ifdef __DAV_CUBE__
    Cube(args, plan, get_block_idx()).run();
#endif
#ifdef __DAV_VEC__
    Vector(args, plan, get_block_idx(), get_subblockid()).run();
#endif
}

#if !defined(__CPU_SIM) && !defined(__COSTMODEL)
// Bytes that `flash_launch` needs for this many blocks.
extern "C" int64_t flash_workspace(int blocks) { return blocks * BLOCK_BYTES; }

// Launches on a stream; a workspace serves one launch at a time. Gives 0, −1 for arguments that the kernel does not
// take, or what the runtime answers. What the launch itself ends in, only the stream tells.
extern "C" int flash_launch(void* stream, void* q, void* k, void* v, void* out, void* workspace, int heads, int heads_q,
                            int heads_kv, int seqlen_q, int seqlen_k, int causal, int blocks, float scale) {
    if (heads < 1 || heads_q < 1 || heads % heads_q || heads_kv < 1 || heads_q % heads_kv) return -1;
    if (seqlen_q < ROWS || seqlen_q % ROWS || seqlen_k < UNIT || seqlen_k % UNIT) return -1;
    if (blocks < 1 || blocks > MAX_BLOCKS) return -1;
    uint64_t ffts = 0;
    uint32_t length = 0;
    if (const int status = rtGetC2cCtrlAddr(&ffts, &length)) return status;
    flash_attention<<<blocks, nullptr, stream>>>((__gm__ void*)ffts, (__gm__ void*)q, (__gm__ void*)k, (__gm__ void*)v,
                                                 (__gm__ void*)out, (__gm__ void*)workspace, heads, heads_q, heads_kv,
                                                 seqlen_q, seqlen_k, causal, blocks, scale);
    return 0;
}
#endif
