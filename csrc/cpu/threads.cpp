#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <ctime>
#include <system_error>
#include <thread>
#include <vector>

namespace mrl {
namespace {

// A clock that is read for every few rows of a scan: where there is a coarse one, it takes a fifth
// of the time.
struct Clock {
    using time_point = std::chrono::steady_clock::time_point;
    static time_point now() {
#ifdef CLOCK_MONOTONIC_COARSE
        timespec time;
        if (clock_gettime(CLOCK_MONOTONIC_COARSE, &time) == 0)
            return time_point(std::chrono::seconds(time.tv_sec) +
                              std::chrono::nanoseconds(time.tv_nsec));
#endif
        return std::chrono::steady_clock::now();
    }
};
constexpr std::chrono::milliseconds BETWEEN_QUESTIONS(50);

std::atomic<bool (*)()> stop_asked{nullptr};

// A thread's part in a call.
struct Part {
    Call* call = nullptr;
    bool asks = false;  // whether this thread asks if the call should stop
};
thread_local Part part;
thread_local Clock::time_point asked;  // when this thread asked last, in any call

bool is_first_thread() {
#ifdef __linux__
    return syscall(SYS_gettid) == getpid();
#else
    return pthread_main_np() != 0;
#endif
}

// Makes this thread part of a call for as long as the object lives.
class Joined {
  public:
    Joined(Call& call, bool asks) : before_(part) { part = {&call, asks}; }
    ~Joined() { part = before_; }

  private:
    const Part before_;
};

struct Member {
    void (*run)(void*);
    void* data;
    Call& call;
    const std::thread::id caller;
    static void start(void* member) {
        const Member& m = *static_cast<Member*>(member);
        const Joined joined(m.call, std::this_thread::get_id() == m.caller && is_first_thread());
        m.run(m.data);
    }
};

// The runtime: its functions, and whether a child was forked that cannot use it.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*pause)(int kind);  // null: older than OpenMP 5
    void (*set_threads)(int);
    bool lost;
};
OpenMP openmp = {};

// Ends this thread's team. Other threads' teams are not in the child's way: it has none of those
// threads.
void before_fork() {
    constexpr int HARD = 2;
    openmp.lost = openmp.parallel && !(openmp.pause && openmp.pause(HARD) == 0);
}

// Where the team could not be ended, our calls use plain threads and PyTorch's ops one thread.
void in_child() {
    if (!openmp.lost) return;
    openmp.parallel = nullptr;
    if (openmp.set_threads) openmp.set_threads(1);
}

template <class Function>
void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

bool use_openmp(const char* library) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    OpenMP found = {};
    if (handle) {
        find(handle, "GOMP_parallel", &found.parallel);
        find(handle, "omp_pause_resource_all", &found.pause);
        find(handle, "omp_set_num_threads", &found.set_threads);
    }
    openmp = found;
    static const int handled = pthread_atfork(before_fork, nullptr, in_child);
    if (handled != 0) throw std::system_error(handled, std::generic_category(), "pthread_atfork");
    return openmp.parallel != nullptr;
}

void stop_where(bool (*stop)()) { stop_asked = stop; }

void poll() {
    if (!part.call) return;
    if (part.asks) {
        const Clock::time_point now = Clock::now();
        if (now - asked > BETWEEN_QUESTIONS) {
            asked = now;
            bool (*const stop)() = stop_asked;
            if (stop && stop()) part.call->stopped = true;
        }
    }
    if (part.call->stopped.load(std::memory_order_relaxed)) throw Interrupted();
}

void run_team(int threads, Call& call, void (*run)(void*), void* data) {
    Member member = {run, data, call, std::this_thread::get_id()};
    if (threads > 1 && openmp.parallel)
        return openmp.parallel(Member::start, &member, unsigned(threads), 0);
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int thread = 1; thread < threads; ++thread)
            others.emplace_back(Member::start, &member);
    } catch (const std::system_error&) {
        // The system has no more threads: those already started share the work.
    }
    Member::start(&member);
    for (std::thread& other : others) other.join();
}

}  // namespace mrl
