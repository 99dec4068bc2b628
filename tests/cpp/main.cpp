// The engine's tests, for sanitizers: make sanitize. An argument picks tests by a part of the name.
#include <chrono>
#include <cstdio>
#include <cstring>

void test_store();
void test_search();
void test_exact();
void test_shared();
void test_fold();
void test_gradients();

int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {{"store", test_store},   {"search", test_search}, {"exact", test_exact},
                 {"shared", test_shared}, {"fold", test_fold},     {"gradients", test_gradients}};
    for (const auto& test : tests) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        const auto begin = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        std::printf("%s: passed in %.1f s\n", test.name, seconds.count());
        std::fflush(stdout);
    }
}
