// Plain threads a call: no pool and no OpenMP, so nothing competes with the caller's own runtimes.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace mrl {

// Runs fn(thread) for thread in [0, threads), this thread included; rethrows what one of them
// threw.
template <class Fn>
void parallel(int threads, const Fn& fn) {
    std::vector<std::exception_ptr> errors(threads);
    auto guarded = [&](int thread) {
        try {
            fn(thread);
        } catch (...) {
            errors[thread] = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    for (int thread = 1; thread < threads; ++thread) {
        try {
            others.emplace_back(guarded, thread);
        } catch (...) {
            errors[thread] = std::current_exception();
        }
    }
    guarded(0);
    for (std::thread& other : others) other.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

// Hands out [0, count) in ascending ranges of `grain`: what one thread receives, it receives in
// order.
class Ranges {
  public:
    Ranges(int64_t count, int64_t grain) : count_(count), grain_(grain) {}
    bool next(int64_t* begin, int64_t* end) {
        *begin = next_.fetch_add(grain_, std::memory_order_relaxed);
        *end = *begin + grain_ < count_ ? *begin + grain_ : count_;
        return *begin < count_;
    }

  private:
    const int64_t count_, grain_;
    std::atomic<int64_t> next_{0};
};

}  // namespace mrl
