// What bounds jit_flash on a CPU, each measured for a moment, so that it fits between two calls of the kernel:
//
//   bound_fp32_gflops(threads, us)               multiply-adds in registers
//   bound_bf16_gflops(threads, us)               bf16 dot products in registers or tiles; 0 without such instructions
//   bound_micro_gflops(threads, us, bf16)        the kernel's own products on packed operands in L1 and L2
//   bound_read_gbps(data, bytes, passes, threads, block)  memory read from its start to its end, or in blocks of its halves
//
// The loops in registers are those of attnbench's peaks, cpu_peak.cpp. There a rate is the best moment of each thread,
// for it must stay above whatever a backend reaches; here it is the mean, for what slows the machine must slow the bound
// as much as the kernel beside it.

#include "cpu_peak.cpp"
#include "gemm.h"
#if defined(FLASH_AMX)
#include "amx.h"
#endif

namespace {

// The kernel's products of a dtype, and what a thread has to hold for them.
template <class T> struct Means {
    using Products = VectorProducts<T>;
    struct Tiles {};
};
#if defined(FLASH_AMX)
template <> struct Means<bfloat> {
    using Products = AmxProducts;
    using Tiles = AmxTiles;
};
#endif

// The sum of the threads' rates, each over its own time. make() gives a thread's work: a callable that does some 10 µs
// of it and returns how much that was, 0 where nothing is left. The calling thread is one of them, as in the kernel.
template <class Make> double mean_rate(int threads, const Make& make) {
    std::atomic<int> missing{threads};
    std::vector<double> rates(static_cast<std::size_t>(threads));
    const auto body = [&](int thread) {
        auto work = make();
        missing.fetch_sub(1);
        while (missing.load() > 0) std::this_thread::yield();
        const Clock::time_point start = Clock::now();
        double amount = 0.0;
        while (const double piece = work()) amount += piece;
        rates[static_cast<std::size_t>(thread)] = amount / Seconds(Clock::now() - start).count();
    };
    std::vector<std::thread> helpers;
    for (int thread = 1; thread < threads; ++thread) helpers.emplace_back(body, thread);
    body(0);
    for (std::thread& helper : helpers) helper.join();
    return std::accumulate(rates.begin(), rates.end(), 0.0);
}

template <class Work> double mean_gflops(int threads, double us) {
    const auto moment = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::micro>(us));
    const auto make = [moment] {
        return [moment, work = Work{}, end = Clock::time_point{}]() mutable {
            const Clock::time_point now = Clock::now();
            if (end == Clock::time_point{}) end = now + moment;
            return now < end ? work() : 0.0;
        };
    };
    return mean_rate(threads, make) / 1e9;
}

// What flash_attention.cpp multiplies for a panel of queries and a block of keys, at head size 128 and without what
// stands between the products: S = K · Q, then O = O + V · S.
template <class T> class Block {
public:
    Block() {
        const std::int64_t q = Own::dim_steps(DIM) * WIDTH, s = Own::KEYS * WIDTH, o = DIM * WIDTH;
        const std::int64_t k = Own::k_floats(DIM), floats = q + s + o + k + Own::v_floats(DIM);
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(floats * 4, 64)))));
        // 2^-7, both as a float and as a pair of bf16: the sums stay finite.
        std::fill_n(memory_.get(), floats, bit_cast<float>(0x3c003c00u));
        q_ = reinterpret_cast<vec*>(memory_.get()), s_ = q_ + q / LANES, o_ = s_ + s / LANES;
        k_ = reinterpret_cast<float*>(o_) + o, v_ = k_ + k;
    }

    double operator()() {
        vec ones[MICRO_VECS];
        std::fill_n(ones, MICRO_VECS, broadcast(1.0f));
        Own::template scores<MICRO_VECS>(k_, Own::KEYS, DIM, 0, Own::KEYS, q_, s_, nothing_);
        Own::template add_values<MICRO_VECS>(v_, Own::KEYS, DIM, 0, Own::KEYS, s_, o_, ones, nothing_);
        keep(*o_);
        return 2.0 * 2.0 * Own::KEYS * DIM * WIDTH;
    }

private:
    using Own = typename Means<T>::Products;
    static constexpr std::int64_t DIM = 128, WIDTH = MICRO_VECS * LANES;

    typename Means<T>::Tiles tiles_;
    std::unique_ptr<float, Free> memory_;
    vec *q_, *s_, *o_;
    float *k_, *v_;
    Ahead nothing_{static_cast<const T*>(nullptr), 0, 0, 0, 1};  // all is in L1 and L2
};

}  // namespace

extern "C" double bound_fp32_gflops(int threads, double us) { return mean_gflops<MultiplyAdd>(threads, us); }

extern "C" double bound_bf16_gflops(int threads, double us) {
#if defined(FLASH_AMX)
    return tiles_granted() ? mean_gflops<TileDot>(threads, us) : 0.0;
#elif defined(__AVX512BF16__)
    return mean_gflops<Bf16Dot>(threads, us);
#else
    (void)threads, (void)us;
    return 0.0;
#endif
}

extern "C" double bound_micro_gflops(int threads, double us, int bf16) {
#if defined(FLASH_AMX)
    if (bf16 && !amx_granted()) return 0.0;
#endif
    return bf16 ? mean_gflops<Block<bfloat>>(threads, us) : mean_gflops<Block<float>>(threads, us);
}

// `block` bytes of the first half and as many of the second in turn, as attention reads K and V; 0: one after the other.
extern "C" double bound_read_gbps(const void* data, std::int64_t bytes, std::int64_t passes, int threads,
                                  std::int64_t block) {
    constexpr std::int64_t PIECE = 256 << 10, SUMS = 8, STEP = SUMS * kVectorBytes;
    const std::int64_t halves = block ? 2 : 1, half = bytes / halves;
    const std::int64_t pieces = (half + PIECE - 1) / PIECE;
    std::atomic<std::int64_t> next{0};
    const auto read = [&] {
        const std::int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= pieces * passes) return 0.0;
        const std::int64_t first = piece % pieces * PIECE, steps = std::min(PIECE, half - first) / STEP;
        const std::int64_t together = block ? block / STEP : steps;
        Ints sums[SUMS] = {};
        for (std::int64_t at = 0; at < steps; at += together) {
            for (std::int64_t of = 0; of < halves; ++of) {
                const char* start = static_cast<const char*>(data) + of * half + first;
                const Ints* source = reinterpret_cast<const Ints*>(start);
                for (std::int64_t step = at; step < std::min(at + together, steps); ++step)
                    for (int i = 0; i < SUMS; ++i) sums[i] |= source[step * SUMS + i];
            }
        }
        Ints total = sums[0];
        for (int i = 1; i < SUMS; ++i) total |= sums[i];
        keep(total);
        return static_cast<double>(halves * steps * STEP);
    };
    return mean_rate(threads, [&] { return read; }) / 1e9;
}
