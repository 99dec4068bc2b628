// Tests of csrc without Python, for sanitizers: make sanitize.
//
//   run [FILTER...]    the tests whose names contain one of the words; all without one
//   run --list         their names
//   run --seconds=S    how long each part of a test runs that has no end of its own
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/search/search.h"

void test_store();
void test_search();
void test_exact();
void test_shared();
void test_bounds();
void test_range();
void test_filter();
void test_filter_exact();
void test_writer();
void test_ladder();
void test_code_stages();
void test_graph();
void test_shortlist();
void test_row_major();
void test_fold();
void test_gradients();
void test_int8();

int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {{"store", test_store},
                 {"search", test_search},
                 {"exact", test_exact},
                 {"shared", test_shared},
                 {"bounds", test_bounds},
                 {"range", test_range},
                 {"filter", test_filter},
                 {"filter exact", test_filter_exact},
                 {"writer", test_writer},
                 {"fold", test_fold},
                 {"gradients", test_gradients},
                 {"ladder", test_ladder},
                 {"shortlist", test_shortlist},
                 {"row major", test_row_major},
                 {"code stages", test_code_stages},
                 {"graph", test_graph},
                 {"int8", test_int8}};
    std::vector<const char*> filters;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--list")) {
            for (const auto& test : tests) std::puts(test.name);
            return 0;
        }
        if (!std::strncmp(argv[i], "--seconds=", 10))
            seconds = std::atof(argv[i] + 10);
        else
            filters.push_back(argv[i]);
    }
    for (const char* filter : filters) {
        bool matches = false;
        for (const auto& test : tests) matches |= std::strstr(test.name, filter) != nullptr;
        if (matches) continue;
        std::fprintf(stderr, "no test's name contains \"%s\"; --list shows them\n", filter);
        return 2;
    }
    mrl::seed_columns = 0;
    for (const auto& test : tests) {
        bool chosen = filters.empty();
        for (const char* filter : filters) chosen |= std::strstr(test.name, filter) != nullptr;
        if (!chosen) continue;
        const auto begin = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
        std::printf("%s: passed in %.1f s\n", test.name, taken.count());
        std::fflush(stdout);
    }
}
