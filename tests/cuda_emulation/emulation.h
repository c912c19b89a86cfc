// What kernels/cuda/flash_attention_sm80.cu takes from the device, on a CPU: a block at a time, a fiber a thread.
//
// It is stricter than a device. It reports
//   - a copy by cp.async that was read, or overtaken by the kernel's end, before it was waited for: until then its target
//     holds NaN;
//   - shared memory that two warps touch without a barrier between them, one of them writing;
//   - addresses that are not aligned, outside shared memory, or outside the tensors;
//   - parts of a tile that are counted before they are there for other blocks, or written later, or read by a block that
//     has not counted before, with a fence after it;
//   - ldmatrix with bank conflicts;
//   - lanes that meet at different operations, threads that do not all come to a barrier.
// Blocks run one after the other, in any order that is asked for. Shared memory holds NaN when a block starts. Products
// are summed up in fp32, in the order of the depth.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __align__(bytes)

struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct Index {
    u32 x;
} threadIdx, blockIdx;

constexpr u32 MOST_SHARED = 232448;
extern "C" {
alignas(128) unsigned char memory[MOST_SHARED];
}

using std::max;
using std::min;

namespace emulated {

constexpr int WARPS = THREADS / 32;
constexpr size_t STACK = 256 << 10;

constexpr int NEVER = -1;

enum State { RUNS, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    u32 target;
    const u16* source;
    u32 bytes;
    bool there;
    int group;
};

struct Thread {
    ucontext_t start;
    jmp_buf here;
    bool started;
    State state;
    const char* operation;  // that it waits at with its warp
    void* arguments;        // of it
    std::vector<Copy> copies;
    int groups;
    int stored;  // to a part, after which barrier, where no fence has followed that other blocks heed; else NEVER
    bool votes;
};

// Who last wrote a word of shared memory and who has read it, between which barriers.
struct Touched {
    int written, writer, read;
    u32 readers;
};

struct Range {
    const char *first, *last;
};

Thread threads[THREADS];
std::vector<char> stacks;
Touched touched[MOST_SHARED / 4];
jmp_buf scheduler;
const Params* params;
int current, epoch, conflicts;
bool vote;                      // whether a thread voted for it at the last barrier
int counted_by, counted_fence;  // the thread that has counted the block's part, and after which barrier its fence was
u32 shared_bytes;
std::vector<Range> readable, writable, met;
std::string fault;

void report(const char* what, long long where = -1) {
    if (!fault.empty()) return;
    char words[200];
    snprintf(words, sizeof words, "%s (%lld) in block %u, thread %d", what, where, blockIdx.x, current);
    fault = words;
}

// ---- 16-bit floats ------------------------------------------------------------------------------------------------

float bits_to_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

u32 float_to_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float widened(u16 x) {
#if BF16
    return bits_to_float(u32(x) << 16);
#else
    const u32 sign = u32(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13);
    const float value = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return sign ? -value : value;
#endif
}

const std::vector<float> WIDENED = [] {
    std::vector<float> all(1 << 16);
    for (u32 x = 0; x < all.size(); ++x) all[x] = widened(u16(x));
    return all;
}();

// To nearest, ties to even.
u32 narrowed(float x) {
    if (std::isnan(x)) return 0x7FFF;
    const u32 bits = float_to_bits(x);
#if BF16
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#else
    const u32 sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    if (size == 0 || size >= 65520.0f) return sign | (size ? 0x7C00 : 0);
    int exponent;
    frexpf(size, &exponent);
    const int unit = std::max(exponent - 11, -24);  // of the last place
    const float steps = nearbyintf(ldexpf(size, -unit));
    const u32 whole = u32(steps);
    return sign | (unit == -24 ? whole : (u32(unit + 24) << 10) + whole);
#endif
}

// ---- threads ------------------------------------------------------------------------------------------------------

void run_thread();

void yield() {
    if (!_setjmp(threads[current].here)) _longjmp(scheduler, 1);
}

void resume(int thread) {
    current = thread;
    threadIdx.x = u32(thread);
    if (_setjmp(scheduler)) return;
    if (threads[thread].started) _longjmp(threads[thread].here, 1);
    threads[thread].started = true;
    setcontext(&threads[thread].start);
}

// `compute` gets all lanes' arguments once they are there.
template <class Arguments, class Compute>
void warp_wide(const char* operation, Arguments& arguments, const Compute& compute) {
    Thread& self = threads[current];
    self.operation = operation, self.arguments = &arguments, self.state = AT_WARP;
    const int first = current / 32 * 32;
    bool all = true;
    for (int i = 0; i < 32; ++i) all &= threads[first + i].state == AT_WARP;
    if (!all) return yield();
    Arguments* lanes[32];
    for (int i = 0; i < 32; ++i) {
        Thread& other = threads[first + i];
        if (strcmp(other.operation, operation)) report("lanes meet at different operations");
        lanes[i] = static_cast<Arguments*>(other.arguments);
        other.state = RUNS;
    }
    if (fault.empty()) compute(lanes);
}

void run_block(void) {
    for (int i = 0; i < THREADS; ++i) {
        Thread& thread = threads[i];
        thread.started = false, thread.state = RUNS, thread.copies.clear(), thread.groups = 0;
        thread.stored = NEVER, thread.votes = false;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = &stacks[i * STACK];
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, run_thread, 0);
    }
    memset(memory, 0xFF, shared_bytes);
    std::fill(touched, touched + shared_bytes / 4, Touched{-1, -1, -1, 0});
    epoch = 0, counted_by = counted_fence = NEVER;
    while (fault.empty()) {
        for (int warp = 0; warp < WARPS; ++warp) {
            for (bool runs = true; runs;) {
                runs = false;
                for (int i = 32 * warp; i < 32 * warp + 32 && fault.empty(); ++i) {
                    if (threads[i].state == RUNS) resume(i), runs = true;
                }
            }
        }
        int done = 0, waiting = 0;
        vote = false;
        for (Thread& thread : threads) {
            vote |= thread.votes, thread.votes = false;
            done += thread.state == DONE, waiting += thread.state == AT_BLOCK;
            if (thread.state == AT_BLOCK) thread.state = RUNS;
        }
        if (done == THREADS) return;
        if (waiting != THREADS) report("not all threads came to a barrier");
        ++epoch;
    }
}

// ---- shared memory ------------------------------------------------------------------------------------------------

unsigned char* touch(u32 address, u32 bytes, bool writes) {
    static unsigned char nowhere[16];
    if (address % bytes || address + bytes > shared_bytes) {
        report("shared memory: no such address, or not aligned", address);
        return nowhere;
    }
    const int warp = current / 32;
    for (u32 word = address / 4; word < (address + bytes) / 4; ++word) {
        Touched& t = touched[word];
        if (t.written == epoch && t.writer != warp) report("shared memory: another warp wrote it, no barrier", address);
        if (t.read != epoch) t.read = epoch, t.readers = 0;
        if (writes) {
            if (t.readers & ~(1u << warp)) report("shared memory: another warp reads it, no barrier", address);
            t.written = epoch, t.writer = warp;
        } else {
            t.readers |= 1u << warp;
        }
    }
    return memory + address;
}

bool inside(const std::vector<Range>& ranges, const void* address, u32 bytes) {
    const char* first = static_cast<const char*>(address);
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const Range& range) { return range.first <= first && first + bytes <= range.last; });
}

const u16* readable_at(const u16* source, u32 bytes) {
    static const u16 nothing[8] = {};
    if (inside(readable, source, bytes) && uintptr_t(source) % bytes == 0) return source;
    report("global memory: no tensor's address, or not aligned");
    return nothing;
}

void store(void* target, const void* source, u32 bytes) {
    if (!inside(writable, target, bytes) || uintptr_t(target) % bytes) {
        return report("global memory: a store to no output, or not aligned");
    }
    memcpy(target, source, bytes);
}

float* part_at(const float* address, u32 bytes) {
    static float nowhere[4];
    if (inside(met, address, bytes) && uintptr_t(address) % bytes == 0) return const_cast<float*>(address);
    report("global memory: no part's address, or not aligned");
    return nowhere;
}

// A quarter of a warp's 16-byte rows lie in eight different groups of four banks.
void count_conflicts(const u32* addresses) {
    u32 seen = 0;
    for (int i = 0; i < 8; ++i) seen |= 1u << addresses[i] / 16 % 8;
    conflicts += seen != 0xFF;
}

struct Matrices {
    u32 source;
    u32* m;
};

void load(const char* name, bool transposed, Matrices& mine) {
    warp_wide(name, mine, [&](Matrices** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            u32 addresses[8];
            u16 values[8][8];
            for (int row = 0; row < 8; ++row) {
                addresses[row] = lanes[8 * matrix + row]->source;
                memcpy(values[row], touch(addresses[row], 16, false), 16);
            }
            count_conflicts(addresses);
            for (int lane = 0; lane < 32; ++lane) {
                const int i = lane / 4, j = lane % 4 * 2;
                const u32 low = transposed ? values[j][i] : values[i][j];
                const u32 high = transposed ? values[j + 1][i] : values[i][j + 1];
                lanes[lane]->m[matrix] = low | high << 16;
            }
        }
    });
}

struct Factors {
    float* d;
    const u32* a;
    u32 b[2];
};

}  // namespace emulated

// ---- what the kernel calls ------------------------------------------------------------------------------------------

inline u32 shared_address(const void* pointer) {
    return u32(static_cast<const unsigned char*>(pointer) - memory);
}

template <int BYTES>
void copy_async(u32 target, const u16* source, bool there) {
    emulated::Thread& self = emulated::threads[emulated::current];
    memset(emulated::touch(target, BYTES, true), 0xFF, BYTES);
    self.copies.push_back({target, source, BYTES, there, self.groups});
}

inline void copy_commit() { ++emulated::threads[emulated::current].groups; }

template <int PENDING>
void copy_wait() {
    emulated::Thread& self = emulated::threads[emulated::current];
    auto& copies = self.copies;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group < self.groups - PENDING; ++copy) {
        unsigned char* const target = emulated::touch(copy->target, copy->bytes, true);
        if (copy->there) {
            memcpy(target, emulated::readable_at(copy->source, copy->bytes), copy->bytes);
        } else {
            memset(target, 0, copy->bytes);
        }
    }
    copies.erase(copies.begin(), copy);
}

inline u32 load_element(const u16* source) { return *emulated::readable_at(source, 2); }
inline void store_global(void* target, uint4 value) { emulated::store(target, &value, 16); }
inline void store_global(void* target, uint2 value) { emulated::store(target, &value, 8); }
inline void store_global(float* target, float value) { emulated::store(target, &value, 4); }

template <int N>
void store_part(float* target, const float (&x)[N]) {
    using namespace emulated;
    if (counted_by != NEVER) report("a part is written after it was counted");
    threads[current].stored = epoch;
    memcpy(part_at(target, 4 * N), x, 4 * N);
}

template <int N>
void load_part(float (&x)[N], const float* source) {
    using namespace emulated;
    if (counted_fence == NEVER || (counted_by != current && counted_fence == epoch)) {
        report("a part is read that may not be there");
    }
    memcpy(x, part_at(source, 4 * N), 4 * N);
}

// What other threads have written before the last barrier is behind this thread's fence too.
inline void __threadfence() {
    using namespace emulated;
    for (int i = 0; i < THREADS; ++i) {
        if (i == current || threads[i].stored < epoch) threads[i].stored = NEVER;
    }
    if (counted_by == current) counted_fence = epoch;
}

inline u32 atomicInc(u32* counter, u32 most) {
    using namespace emulated;
    if (!inside(met, counter, 4) || uintptr_t(counter) % 4) {
        report("global memory: no counter's address, or not aligned");
        return 0;
    }
    for (const Thread& thread : threads) {
        if (thread.stored != NEVER) report("a part is counted that may not be there");
    }
    counted_by = current;
    const u32 before = *counter;
    *counter = before >= most ? 0 : before + 1;
    return before;
}

inline void store_shared(u32 target, u32 value) { memcpy(emulated::touch(target, 4, true), &value, 4); }
inline void store_shared(u32 target, uint4 value) { memcpy(emulated::touch(target, 16, true), &value, 16); }

inline void store_shared(u32 target, float first, float second) {
    const float both[2] = {first, second};
    memcpy(emulated::touch(target, 8, true), both, 8);
}

inline uint4 load_shared(u32 source) {
    uint4 value;
    memcpy(&value, emulated::touch(source, 16, false), 16);
    return value;
}

inline void load_matrices(u32 (&m)[4], u32 source) {
    emulated::Matrices mine{source, m};
    emulated::load("ldmatrix", false, mine);
}

inline void load_transposed(u32 (&m)[4], u32 source) {
    emulated::Matrices mine{source, m};
    emulated::load("ldmatrix.trans", true, mine);
}

inline void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulated::Factors mine{d, a, {b0, b1}};
    emulated::warp_wide("mma", mine, [](emulated::Factors** lanes) {
        const float* const widened = emulated::WIDENED.data();
        float left[16][16], right[16][8], sum[16][8];  // right: depth, column
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                const u32 both = lanes[lane]->a[i];
                left[row + i % 2 * 8][column + i / 2 * 8] = widened[both & 0xFFFF];
                left[row + i % 2 * 8][column + i / 2 * 8 + 1] = widened[both >> 16];
                sum[row + i / 2 * 8][column + i % 2] = lanes[lane]->d[i];
            }
            for (int i = 0; i < 2; ++i) {
                right[column + 8 * i][row] = widened[lanes[lane]->b[i] & 0xFFFF];
                right[column + 8 * i + 1][row] = widened[lanes[lane]->b[i] >> 16];
            }
        }
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) {
                for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        }
    });
}

inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }
inline float exp2_approx(float x) { return flushed(exp2f(flushed(x))); }
inline float inverse_approx(float x) { return flushed(1 / flushed(x)); }
inline float log2_approx(float x) { return log2f(x); }
inline void recompute(u32&) {}
inline u32 pack(float low, float high) { return emulated::narrowed(low) | emulated::narrowed(high) << 16; }
inline float __int_as_float(u32 bits) { return emulated::bits_to_float(bits); }
inline u32 __umulhi(u32 a, u32 b) { return u32((unsigned long long)(a) * b >> 32); }

inline void __syncthreads() {
    emulated::threads[emulated::current].state = emulated::AT_BLOCK;
    emulated::yield();
}

inline bool __syncthreads_or(bool value) {
    emulated::threads[emulated::current].votes = value;
    __syncthreads();
    return emulated::vote;
}

inline void __syncwarp() {
    int nothing = 0;
    emulated::warp_wide("syncwarp", nothing, [](int**) {});
}

inline float __shfl_xor_sync(u32, float value, int mask) {
    float given[2] = {value, 0};
    emulated::warp_wide("shfl", given, [&](float(**lanes)[2]) {
        for (int lane = 0; lane < 32; ++lane) (*lanes[lane])[1] = (*lanes[lane ^ mask])[0];
    });
    return given[1];
}

inline bool __any_sync(u32, bool value) {
    bool given = value;
    emulated::warp_wide("any", given, [](bool** lanes) {
        const bool any = std::any_of(lanes, lanes + 32, [](bool* lane) { return *lane; });
        for (int lane = 0; lane < 32; ++lane) *lanes[lane] = any;
    });
    return given;
}

// What a cvt of two floats gives, for a test of its own.
extern "C" u32 packed(float low, float high) { return pack(low, high); }

extern "C" void flash_attention(const Params p);

void emulated::run_thread() {
    flash_attention(*params);
    Thread& self = threads[current];
    if (!self.copies.empty()) report("copies that nobody waited for");
    self.state = DONE;
    _longjmp(scheduler, 1);
}

// Runs the blocks of this `order` and gives the first fault's words, or an empty string; `ranges` are first and last
// address of `reads` tensors that are read, of `writes` that are written, and of `meets` where blocks meet.
extern "C" const char* emulate(const Params* given, u32 blocks, const u32* order, u32 shared, int reads, int writes,
                               int meets, const char** ranges, int* bank_conflicts) {
    using namespace emulated;
    params = given, shared_bytes = shared, conflicts = 0, fault.clear();
    readable.clear(), writable.clear(), met.clear();
    if (shared > MOST_SHARED) return "more shared memory than there is";
    stacks.resize(THREADS * STACK);
    for (int i = 0; i < reads + writes + meets; ++i) {
        auto& of = i < reads ? readable : i < reads + writes ? writable : met;
        of.push_back({ranges[2 * i], ranges[2 * i + 1]});
    }
    for (u32 i = 0; i < blocks && fault.empty(); ++i) blockIdx.x = order[i], run_block();
    *bank_conflicts = conflicts;
    return fault.c_str();
}
