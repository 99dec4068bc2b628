// The engine's tests, for sanitizers: make sanitize. An argument picks tests by a part of the name,
// a second says for how many seconds those go on that could for ever.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "check.h"

void test_store();
void test_search();
void test_exact();
void test_shared();
void test_bounds();
void test_range();
void test_filter();
void test_filter_exact();
void test_writer();
void test_fold();
void test_gradients();

int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {{"store", test_store},        {"search", test_search},
                 {"exact", test_exact},        {"shared", test_shared},
                 {"bounds", test_bounds},      {"range", test_range},
                 {"filter", test_filter},      {"filter exact", test_filter_exact},
                 {"writer", test_writer},      {"fold", test_fold},
                 {"gradients", test_gradients}};
    if (argc > 2) seconds = std::atof(argv[2]);
    for (const auto& test : tests) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        const auto begin = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
        std::printf("%s: passed in %.1f s\n", test.name, taken.count());
        std::fflush(stdout);
    }
}
