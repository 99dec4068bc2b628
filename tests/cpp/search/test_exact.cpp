// Certified exact search against brute force in fp64: the same rows in the same order, always.
#include <atomic>
#include <thread>

#include "search/exact.h"

namespace {

void check_table(const Table& table, const std::vector<int64_t>& prefixes, int64_t count,
                 std::mt19937& random, Visits* visits) {
    const QueryRows queries(table, count, random);
    const Kernels& best = *tested_kernels().front();
    const std::string name = scenario;
    for (Metric metric : METRICS) {
        const std::vector<double> scores = scores64(table, queries, metric);
        for (int64_t prefix : prefixes)
            for (bool coded : {false, true}) {
                const Database database(table, {prefix, coded}, split(table.n), 77, best, 1);
                for (int64_t k : {int64_t(1), int64_t(10), int64_t(100), table.n + 3}) {
                    if (k > 1000) continue;
                    const Found right = brute_force(scores, count, table.n, all_rows(table.n), k);
                    for (const Kernels* kernels : tested_kernels())
                        for (int threads : THREADS) {
                            scenario = name + ", metric " + std::to_string(int(metric)) + ", k " +
                                       std::to_string(k) + ", prefix " + std::to_string(prefix) +
                                       (coded ? " coded, " : ", ") + kernels->name + ", " +
                                       std::to_string(threads) + " threads";
                            check_found(find_exact(*kernels, database.rows, queries, metric, k,
                                                   threads, visits),
                                        right);
                        }
                }
            }
    }
}

// Vectors so wide that the queries take two passes.
void check_passes(const Kernels& kernels, std::mt19937& random) {
    const Table table = make_table(130, 1400, DType::BF16, random);
    const QueryRows queries(table, 100, random);
    const Found right =
        brute_force(scores64(table, queries, COSINE), 100, table.n, all_rows(table.n), 10);
    Visits visits;
    for (bool coded : {false, true}) {
        const Database database(table, {100, coded}, split(table.n), table.n, kernels, 1);
        check_found(find_exact(kernels, database.rows, queries, COSINE, 10, 2, &visits), right);
    }
}

// Bounds by several threads, each of which finds some of the best rows.
void check_threads(std::mt19937& random) {
    const Table table = make_table(9000, 64, DType::F16, random);
    const QueryRows queries(table, 24, random);
    const Kernels& kernels = *tested_kernels().front();
    const Found right =
        brute_force(scores64(table, queries, IP), 24, table.n, all_rows(table.n), 10);
    for (bool coded : {false, true}) {
        const Database database(table, {24, coded}, split(table.n), table.n, kernels, 2);
        for (int threads : {2, 4}) {
            scenario = std::string("exact, ") + (coded ? "coded, " : "") + std::to_string(threads) +
                       " threads";
            Visits visits;
            check_found(find_exact(kernels, database.rows, queries, IP, 10, threads, &visits),
                        right);
            CHECK(visits.pruned > 12);
        }
    }
}

void check_results(const Kernels& kernels, std::mt19937& random) {
    const Table table = make_table(200, 24, DType::F32, random);
    const QueryRows queries(table, 2, random);
    const Table huge = scaled(table, {1e20f}, DType::F32);
    const Database database(huge, {8, false}, split(200), 200, kernels, 1);
    Found found = room_for(2, 5);
    std::vector<int64_t> touched(2);
    CHECK(exact_search({kernels, 1}, database.rows, queries.queries, L2, {24, 5},
                       {found.scores.data(), found.ids.data()},
                       touched.data()) == Status::OVERFLOW_);
}

}  // namespace

void test_exact() {
    std::mt19937 random(3);
    check_threads(random);
    if (RACES_ONLY) return;
    Visits visits;
    const struct {
        int64_t n, width, queries;
    } sizes[] = {{1, 12, 3}, {65, 30, 7}, {1000, 37, 0}, {1000, 70, 6}, {5000, 64, 29}};
    for (size_t i = 0; i < std::size(sizes); ++i) {
        const auto [n, width, queries] = sizes[i];
        scenario = "exact, " + std::to_string(n) + " rows";
        std::vector<int64_t> prefixes = {width / 4 + 1};
        if (i < 2) prefixes.push_back(width);
        check_table(make_table(n, width, DTYPES[i % 3], random), prefixes, queries, random,
                    &visits);
    }
    CHECK(visits.pruned > 0 && visits.full > 0);  // both ways were taken
    const Table table = make_table(700, 21, DType::F32, random);
    const std::vector<std::vector<float>> factors = {
        {0.0f}, {1e-25f}, {1e18f}, {1.0f, 1e-25f, 0.0f, 1e18f}};
    for (size_t i = 0; i < factors.size(); ++i)
        for (DType dtype : {DType::F32, DType::BF16}) {
            scenario = "exact, rows of extreme size " + std::to_string(i);
            check_table(scaled(table, factors[i], dtype), {6}, 4, random, &visits);
        }
    scenario = "exact, one row again and again";
    Table same = make_table(2500, 32, DType::F32, random);
    for (int64_t row = 1; row < same.n; ++row)
        std::copy_n(same.row(0), 32, same.values.begin() + row * 32);
    check_table(same, {8}, 7, random, &visits);
    for (const Kernels* kernels : tested_kernels()) {
        scenario = std::string("exact, ") + kernels->name;
        check_passes(*kernels, random);
        check_results(*kernels, random);
    }
}

// Several threads search the same rows at once, as an index is searched without a lock.
void test_shared() {
    std::mt19937 random(4);
    const Table table = make_table(4000, 48, DType::F16, random);
    const QueryRows queries(table, 24, random);
    for (bool coded : {false, true}) {
        scenario = coded ? "shared, coded" : "shared";
        const Kernels& kernels = *tested_kernels().front();
        const Database database(table, {12, coded}, split(table.n), table.n, kernels, 1);
        const auto funnel = [&] {
            Found found = room_for(24, 10);
            CHECK(search({kernels, 2}, database.rows, queries.queries, COSINE,
                         {{12, 400}, {48, 10}},
                         {found.scores.data(), found.ids.data()}) == Status::OK);
            return found;
        };
        const auto exact = [&] {
            Visits visits;
            return find_exact(kernels, database.rows, queries, COSINE, 10, 2, &visits);
        };
        const Found found = funnel(), best = exact();
        std::vector<std::thread> threads;
        for (int thread = 0; thread < 4; ++thread)
            threads.emplace_back([&] {
                for (int i = 0; i < 3; ++i) {
                    CHECK(funnel() == found);
                    CHECK(exact() == best);
                }
            });
        for (std::thread& thread : threads) thread.join();
    }
}
