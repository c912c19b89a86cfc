// What this CPU can do at most: multiply-adds a second, and bytes read a second from a working set of a given size.
//
//   attnbench_fp32_gflops(threads)                   GFLOP/s of fp32 multiply-adds in the widest vectors
//   attnbench_bf16_gflops(threads)                   GFLOP/s of bf16 dot products into fp32; 0 without AVX512-BF16
//   attnbench_read_gbps(threads, bytes_per_thread)   GB/s read over and over, each thread its own bytes
//
// Each is the best of several short windows that all threads start together: on a machine shared with others only the
// best says anything of the hardware. Needs -ffp-contract=fast for the multiply-adds; no data leaves this file.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// Measured on a shared 2-core EPYC: windows of 5 ms fall between two time slices of a neighbour often enough that the
// best of 10 repeats within 3 %; the best of 3 does within 15 %.
constexpr int kWindows = 10;
constexpr std::chrono::milliseconds kWindow{5};

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

struct Span {
    Clock::time_point start, end;
    double amount;
};

// The best rate of all threads together, in amount a second. make() gives a thread's work, called within the thread:
// a callable that does some 10 µs of it and returns how much that was.
template <class Make>
double best_rate(int threads, Make make) {
    std::vector<Span> spans(static_cast<std::size_t>(threads) * kWindows);
    std::atomic<int> arrived{0}, crowd{0};  // crowd: how many threads there are, once that is known
    auto body = [&](int thread) {
        auto work = make();
        work();
        for (int window = 0; window < kWindows; ++window) {
            arrived.fetch_add(1);
            while (crowd.load() == 0 || arrived.load() < crowd.load() * (window + 1)) std::this_thread::yield();
            Span span{Clock::now(), {}, 0.0};
            do {
                span.amount += work();
                span.end = Clock::now();
            } while (span.end - span.start < kWindow);
            spans[static_cast<std::size_t>(window) * threads + thread] = span;
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int thread = 0; thread < threads; ++thread) pool.emplace_back(body, thread);
    } catch (const std::system_error&) {
        // Fewer threads than asked for; those that run must not wait for the others.
    }
    const int running = static_cast<int>(pool.size());
    crowd.store(running);
    for (auto& thread : pool) thread.join();

    double best = 0.0;
    for (int window = 0; window < kWindows && running > 0; ++window) {
        const Span* row = &spans[static_cast<std::size_t>(window) * threads];
        auto start = row[0].start, end = row[0].end;
        double amount = 0.0;
        for (int thread = 0; thread < running; ++thread) {
            start = std::min(start, row[thread].start);
            end = std::max(end, row[thread].end);
            amount += row[thread].amount;
        }
        best = std::max(best, amount / Seconds(end - start).count());
    }
    return best;
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
