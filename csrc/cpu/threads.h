// Threads for one call: PyTorch's own OpenMP team where its runtime was named, else plain threads.
// A call can be stopped while it runs, and a forked child can make calls of its own.
//
// An OpenMP team that has just worked spins for a while, waiting for more. Threads of our own, or
// the team of a second OpenMP runtime, would have to share the cores with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace mrl {

// Uses the GNU OpenMP runtime of this path, already loaded, from now on; false where it is none.
//
// Such a team does not survive fork(): the child has none of its threads and would wait for them
// for ever. So the thread that forks ends its team first; parent and child start a new one with
// their next call.
bool use_openmp(const char* library);

// Thrown by a call that was stopped; its results are incomplete.
struct Interrupted : std::exception {
    const char* what() const noexcept override { return "interrupted"; }
};

// Has the process's first thread, the one that Python's signal handlers run in, ask `stop` about
// every 50 ms while its calls work; true stops the call. Null: no call is stopped.
void stop_where(bool (*stop)());

// What the threads of one call share.
struct Call {
    std::atomic<bool> stopped{false}, failed{false};
    std::exception_ptr error;  // the first one; the thread that sets `failed` writes it
};

// Runs member(data) on up to `threads` threads, this thread included. Their `poll` looks at `call`.
void run_team(int threads, Call& call, void (*member)(void*), void* data);

// Throws Interrupted where this thread's call was stopped. Long loops call it at least every tenth
// of a second, or they are stopped late.
void poll();

// Runs fn(thread) once for each thread in [0, threads). Where one throws the others stop at their
// next poll, and what it threw is thrown here.
template <class Fn>
void parallel(int threads, const Fn& fn) {
    struct Team {
        const Fn& fn;
        int threads;
        std::atomic<int> next;
        Call call;
    } team = {fn, threads, {0}, {}};
    run_team(
        threads, team.call,
        [](void* data) {
            Team& team = *static_cast<Team*>(data);
            for (int thread; (thread = team.next++) < team.threads;) {
                try {
                    team.fn(thread);
                } catch (...) {
                    if (!team.call.failed.exchange(true))
                        team.call.error = std::current_exception();
                    team.call.stopped = true;
                }
            }
        },
        &team);
    if (team.call.error) std::rethrow_exception(team.call.error);
}

// Hands out [0, count) in ascending ranges of `grain`: what one thread receives, it receives in
// order. Polls.
class Ranges {
  public:
    Ranges(int64_t count, int64_t grain) : count_(count), grain_(grain) {}
    bool next(int64_t* begin, int64_t* end) {
        poll();
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
