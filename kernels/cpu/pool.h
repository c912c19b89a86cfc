// Threads that wait for work between calls. Knows nothing of attention.
//
// A call costs no thread creation, and none of the pool's threads runs for longer than SPIN after it: those that find
// no more work sleep. A forked process starts with no threads, and makes its own.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace {

class Pool {
public:
    static constexpr int MAX_HELPERS = 1023;
    static constexpr std::chrono::microseconds SPIN{50};

    // Calls work(0) here and, on up to `helpers` other threads, work(1), work(2), …; returns when all have returned.
    // Fewer help where the system gives no more threads, where some are late, or where another call has the pool.
    template <class Work> void run(int helpers, const Work& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return work(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            start(helpers);
            call_ = [](const void* what, int index) { (*static_cast<const Work*>(what))(index); };
            work_ = &work;
            joined_ = 0;
            places_.store(helpers, std::memory_order_release);
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        places_.store(0, std::memory_order_relaxed);  // who is late finds nothing
        lock.unlock();
        spin([this] { return active_.load(std::memory_order_acquire) == 0; });
        lock.lock();
        done_.wait(lock, [this] { return active_.load(std::memory_order_relaxed) == 0; });
    }

private:
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    void (*call_)(const void*, int) = nullptr;
    const void* work_ = nullptr;
    int started_ = 0, joined_ = 0;
    std::atomic<int> places_{0}, active_{0};  // written under mutex_, read while spinning

    template <class Condition> static bool spin(const Condition& condition) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 16; ++i) {
                if (condition()) return true;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#elif defined(__aarch64__)
                asm volatile("yield");
#endif
            }
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    void start(int helpers) {
        try {
            for (; started_ < helpers && started_ < MAX_HELPERS; ++started_) std::thread([this] { help(); }).detach();
        } catch (const std::exception&) {
            // The system has no thread left to give: those that are there do all the work.
        }
    }

    void help() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            const auto there_is_a_place = [this] { return places_.load(std::memory_order_acquire) > 0; };
            if (!there_is_a_place()) {
                lock.unlock();
                spin(there_is_a_place);
                lock.lock();
                wake_.wait(lock, there_is_a_place);
            }
            places_.fetch_sub(1, std::memory_order_relaxed);
            active_.fetch_add(1, std::memory_order_relaxed);
            const int index = ++joined_;
            lock.unlock();
            call_(work_, index);
            lock.lock();
            if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
        }
    }
};

// Made when the library is loaded, so that no fork can come in between, and never destroyed: its threads may sleep in it
// when the process exits.
alignas(Pool) char pool_memory[sizeof(Pool)];
Pool& pool = [] () -> Pool& {
    pthread_atfork(nullptr, nullptr, [] { new (pool_memory) Pool; });
    return *new (pool_memory) Pool;
}();

}  // namespace
