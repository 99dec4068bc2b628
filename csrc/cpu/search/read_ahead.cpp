#include "cpu/search/read_ahead.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace mrl {

#if defined(RUSAGE_THREAD) && defined(MADV_WILLNEED)

bool has_waited() {
    thread_local long seen = 0;
    rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) != 0 || usage.ru_majflt == seen) return false;
    seen = usage.ru_majflt;
    return true;
}

namespace {

void ask_for(std::vector<RowColumns> places, size_t bytes) {
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const auto sooner = [](const RowColumns& a, const RowColumns& b) { return a.at < b.at; };
    std::sort(places.begin(), places.end(), sooner);  // in the file's order: half the time
    for (const RowColumns& place : places) {
        const uintptr_t begin = uintptr_t(place.at) / page * page;
        // It is advice: the system may take none.
        madvise(reinterpret_cast<void*>(begin), uintptr_t(place.at) + bytes - begin, MADV_WILLNEED);
    }
}

}  // namespace

bool read_ahead(const std::vector<RowColumns>& places, size_t bytes) {
    constexpr std::chrono::microseconds SLOW(5);  // no disk answers sooner
    if (bytes == 0) return false;
    auto begin = std::chrono::steady_clock::now();
    for (size_t first = 0, last = 1; first < places.size(); first = last, last *= 4) {
        last = std::min(last, places.size());
        for (size_t i = first; i < last; ++i)
            static_cast<void>(*static_cast<const volatile char*>(places[i].at));
        const auto end = std::chrono::steady_clock::now();
        if (end - begin > SLOW && has_waited()) {
            ask_for(places, bytes);
            return true;
        }
        begin = end;
    }
    return false;
}

#else

bool has_waited() { return false; }
bool read_ahead(const std::vector<RowColumns>&, size_t) { return false; }

#endif

}  // namespace mrl
