// What this CPU can do at most: multiply-adds a second, and bytes read a second from a working set of a given size.
//
//   attnbench_fp32_gflops(threads)                   GFLOP/s of fp32 multiply-adds in the widest vectors
//   attnbench_bf16_gflops(threads)                   GFLOP/s of bf16 products into fp32, by AMX where it is there, else
//                                                    by dot products; 0 where there is neither
//   attnbench_read_gbps(threads, bytes_per_thread)   GB/s read over and over, each thread its own bytes
//
// Each is the sum of every thread's best moment while all of them work, so that it stays an upper bound on a machine
// shared with others, where the threads seldom run undisturbed all at once. Needs -ffp-contract=fast for the
// multiply-adds.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// Measured on a 2-core EPYC, 12 times each, alone and with two busy loops beside it: moments of 1 ms gave 200 to
// 205 GFLOP/s either way, moments of 3 ms once 166; the best 5 ms of both threads at once, 205 alone, gave 102.
constexpr std::chrono::milliseconds kTotal{50};
constexpr std::chrono::microseconds kMoment{1000};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));

// Two units of latency 4 want 8 chains; 12 leave slack, and with two operands still fit 16 registers.
constexpr int kChains = 12;

template <class T>
void keep(T& value) {
    asm volatile("" : "+m"(value) : : "memory");
}

// The best rate of all threads together, in amount a second. make() gives a thread's work, called within the thread:
// a callable that does some 10 µs of it and returns how much that was.
template <class Make>
double best_rate(int threads, Make make) {
    std::atomic<int> ready{0};
    std::atomic<Clock::rep> deadline{0};  // one for all: who comes late must not go on alone, with the memory for itself
    std::vector<double> best(static_cast<std::size_t>(threads), 0.0);
    auto body = [&](int thread) {
        auto work = make();
        work();
        ready.fetch_add(1);
        while (deadline.load() == 0) std::this_thread::yield();
        const Clock::time_point end{Clock::duration(deadline.load())};
        for (auto start = Clock::now(), now = start; now < end; start = now) {
            double amount = 0.0;
            do {
                amount += work();
                now = Clock::now();
            } while (now - start < kMoment);
            best[thread] = std::max(best[thread], amount / Seconds(now - start).count());
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int thread = 0; thread < threads; ++thread) pool.emplace_back(body, thread);
    } catch (const std::system_error&) {
        // Fewer threads than asked for; those that run must not wait for the others.
    }
    while (ready.load() < static_cast<int>(pool.size())) std::this_thread::yield();
    deadline.store((Clock::now() + kTotal).time_since_epoch().count());
    for (auto& thread : pool) thread.join();
    return std::accumulate(best.begin(), best.end(), 0.0);
}

struct MultiplyAdd {
    Floats chains[kChains] = {};
    float factor = 0.999f, summand = 1e-3f;

    double operator()() {
        constexpr int kSteps = 4096;
        keep(factor);  // so that nothing is computed at compile time
        keep(summand);
        const Floats a = factor - Floats{}, b = summand - Floats{};
        Floats c[kChains];
        for (int i = 0; i < kChains; ++i) c[i] = chains[i];
        for (int step = 0; step < kSteps; ++step)
            for (int i = 0; i < kChains; ++i) c[i] = c[i] * a + b;
        for (int i = 0; i < kChains; ++i) chains[i] = c[i];
        keep(chains);
        return 2.0 * kSteps * kChains * (kVectorBytes / sizeof(float));
    }
};

#ifdef __AVX512BF16__
struct Bf16Dot {
    __m512 chains[kChains] = {};
    std::uint16_t factor = 0x3c00;  // 2^-7: the sums stay finite for longer than anybody measures

    double operator()() {
        constexpr int kSteps = 4096;
        keep(factor);
        const __m512bh a = (__m512bh)_mm512_set1_epi16(static_cast<short>(factor)), b = a;
        __m512 c[kChains];
        for (int i = 0; i < kChains; ++i) c[i] = chains[i];
        for (int step = 0; step < kSteps; ++step)
            for (int i = 0; i < kChains; ++i) c[i] = _mm512_dpbf16_ps(c[i], a, b);
        for (int i = 0; i < kChains; ++i) chains[i] = c[i];
        keep(chains);
        return 2.0 * kSteps * kChains * 32;
    }
};
#endif

#ifdef __AMX_BF16__
class TileDot {
  public:
    double operator()() {
        constexpr int kSteps = 2048;
        const Tiles tiles;
        for (int step = 0; step < kSteps; ++step) {  // four sums of 16 × 16 from two tiles of either side
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        return 2.0 * kSteps * 4 * 16 * 16 * 32;
    }

  private:
    struct Tiles {
        Tiles() {
            struct Config {
                std::uint8_t palette, start_row, reserved[14];
                std::uint16_t row_bytes[16];
                std::uint8_t rows[16];
            };
            // Static: some compilers do not know that all of it is read, and would not fill a local one.
            alignas(64) static constexpr Config config = {
                1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
            _tile_loadconfig(&config);  // sets all tiles to zeros
        }
        ~Tiles() { _tile_release(); }
    };
};

// Linux lets a process use tiles where it has asked for them.
bool tiles_granted() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Free {
    void operator()(void* data) const { std::free(data); }
};

// Goes round a buffer of its own, one piece a call; it goes on where it stopped, so a large buffer is cold again.
class Reader {
  public:
    explicit Reader(std::int64_t bytes)
        : bytes_((std::max<std::int64_t>(bytes, kGrain) / kGrain) * kGrain),
          data_(static_cast<char*>(std::aligned_alloc(kGrain, static_cast<std::size_t>(bytes_)))) {
        // Written, not only reserved: untouched pages may all be one page of zeros. And by the thread that reads it.
        if (data_) std::memset(data_.get(), 1, static_cast<std::size_t>(bytes_));
    }

    double operator()() {
        if (!data_) return 0.0;
        const std::int64_t piece = std::min(bytes_ - at_, kPiece), passes = kPiece / std::min(bytes_, kPiece);
        const Ints* source = reinterpret_cast<const Ints*>(data_.get() + at_);
        const std::int64_t vectors = piece / kVectorBytes;
        Ints sums[kSums] = {};
        for (std::int64_t pass = 0; pass < passes; ++pass) {
            for (std::int64_t i = 0; i < vectors; i += kSums)
                for (int j = 0; j < kSums; ++j) sums[j] |= source[i + j];
            asm volatile("" : : : "memory");  // what was read may have changed: the next pass reads it again
        }
        Ints total = sums[0];  // a copy: what keep() has seen lives in memory, and would be stored at every step
        for (int j = 1; j < kSums; ++j) total |= sums[j];
        keep(total);
        at_ = at_ + piece < bytes_ ? at_ + piece : 0;
        return static_cast<double>(piece * passes);
    }

  private:
    static constexpr std::int64_t kGrain = 4096, kPiece = 256 << 10;
    static constexpr int kSums = 8;

    std::int64_t bytes_, at_ = 0;
    std::unique_ptr<char, Free> data_;
};

}  // namespace

extern "C" double attnbench_fp32_gflops(int threads) {
    return best_rate(threads, [] { return MultiplyAdd{}; }) / 1e9;
}

extern "C" double attnbench_bf16_gflops(int threads) {
#ifdef __AMX_BF16__
    if (tiles_granted()) return best_rate(threads, [] { return TileDot{}; }) / 1e9;
#endif
#ifdef __AVX512BF16__
    return best_rate(threads, [] { return Bf16Dot{}; }) / 1e9;
#else
    (void)threads;
    return 0.0;
#endif
}

extern "C" double attnbench_read_gbps(int threads, std::int64_t bytes_per_thread) {
    return best_rate(threads, [=] { return Reader(bytes_per_thread); }) / 1e9;
}
