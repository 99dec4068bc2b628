// Threads for one call: PyTorch's own OpenMP team where its runtime was named, else plain threads.
//
// A team that has just worked spins for a while in wait of more; threads beside it would share its
// cores with that. And a second OpenMP runtime would bring a second team.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace mrl {

// Uses the GNU OpenMP runtime of this path, already loaded, from now on; false where it is none.
bool use_openmp(const char* library);

// Runs member(data) on up to `threads` threads, this thread included.
void run_team(int threads, void (*member)(void*), void* data);

// Runs fn(thread) once for each thread in [0, threads); rethrows what one of them threw.
template <class Fn>
void parallel(int threads, const Fn& fn) {
    struct Team {
        const Fn& fn;
        int threads;
        std::atomic<int> next;
        std::vector<std::exception_ptr> errors;
    } team = {fn, threads, {0}, std::vector<std::exception_ptr>(threads)};
    run_team(
        threads,
        [](void* data) {
            Team& team = *static_cast<Team*>(data);
            for (int thread; (thread = team.next++) < team.threads;) {
                try {
                    team.fn(thread);
                } catch (...) {
                    team.errors[thread] = std::current_exception();
                }
            }
        },
        &team);
    for (const std::exception_ptr& error : team.errors)
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

// Calls fn(i) for each i below count.
template <class Fn>
void each(int64_t count, int threads, const Fn& fn) {
    if (count < threads) threads = count > 1 ? int(count) : 1;
    Ranges ranges(count, count < 64 * threads ? 1 : 8);
    parallel(threads, [&](int) {
        for (int64_t i, last; ranges.next(&i, &last);)
            for (; i < last; ++i) fn(i);
    });
}

}  // namespace mrl
