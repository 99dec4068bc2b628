#include "cpu/threads.h"

#include <dlfcn.h>

#include <system_error>
#include <thread>

namespace mrl {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

bool use_openmp(const char* library) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    void* symbol = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
    gomp_parallel = reinterpret_cast<GompParallel>(symbol);
    return symbol != nullptr;
}

void run_team(int threads, void (*member)(void*), void* data) {
    if (threads > 1) {
        if (const GompParallel gomp = gomp_parallel) return gomp(member, data, threads, 0);
    }
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int thread = 1; thread < threads; ++thread) others.emplace_back(member, data);
    } catch (const std::system_error&) {
        // No more threads to be had: those there are share the work.
    }
    member(data);
    for (std::thread& other : others) other.join();
}

}  // namespace mrl
