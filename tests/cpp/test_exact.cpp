// Certified exact search against brute force in fp64: the same rows in the same order, always.
#include <atomic>
#include <thread>

#include "vectors.h"

namespace {

UNWATCHED double score64(const float* query, const float* row, int64_t dim, Metric metric) {
    double dot = 0.0, square = 0.0, qq = 0.0, xx = 0.0;
    for (int64_t c = 0; c < dim; ++c) {
        const double q = query[c], x = row[c];
        dot += q * x;
        square += (q - x) * (q - x);
        qq += q * q;
        xx += x * x;
    }
    if (metric == Metric::L2) return -square;
    if (metric == Metric::IP) return dot;
    const double norms = std::sqrt(qq) * std::sqrt(xx);
    return norms > 0.0 ? dot / norms : 0.0;
}

// [queries, n]
std::vector<double> scores64(const Table& table, const QueryRows& queries, Metric metric) {
    std::vector<double> scores;
    for (int64_t q = 0; q < queries.queries.n; ++q)
        for (int64_t row = 0; row < table.n; ++row)
            scores.push_back(score64(queries.row(q), table.row(row), table.width, metric));
    return scores;
}

Found brute_force(const std::vector<double>& scores, int64_t queries, int64_t n, int64_t k) {
    Found found = room_for(queries, k);
    std::fill(found.scores.begin(), found.scores.end(), -INFINITY);
    std::fill(found.ids.begin(), found.ids.end(), -1);
    for (int64_t q = 0; q < queries; ++q) {
        std::vector<int64_t> rows(n);
        for (int64_t row = 0; row < n; ++row) rows[row] = row;
        const double* mine = scores.data() + q * n;
        keep_best(&rows, k, [&](int64_t row) { return mine[row]; });
        for (size_t i = 0; i < rows.size(); ++i) {
            found.ids[q * k + i] = rows[i];
            found.scores[q * k + i] = float(mine[rows[i]]);
        }
    }
    return found;
}

struct Visits {
    int64_t pruned = 0, full = 0;  // queries that read some, or all, of the rows
};

Found find(const Kernels& kernels, const Database& database, const QueryRows& queries,
           Metric metric, int64_t k, int threads, Visits* visits) {
    const int64_t count = queries.queries.n, n = database.rows.count();
    Found found = room_for(count, k);
    std::vector<int64_t> touched(count, -7);
    CHECK(exact_search(kernels, database.rows, queries.queries, metric, queries.width, k, threads,
                       found.scores.data(), found.ids.data(), touched.data()) == Status::OK);
    for (int64_t rows : touched) {
        CHECK(rows >= 0 && rows <= n);
        ++(rows < n ? visits->pruned : visits->full);
    }
    return found;
}

void check_found(const Found& found, const Found& right) {
    for (size_t i = 0; i < right.ids.size(); ++i) {
        CHECK_EQUAL(found.ids[i], right.ids[i]);
        CHECK_NEAR(found.scores[i], right.scores[i], 2 * ROUNDING * std::abs(right.scores[i]));
    }
}

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
                    const Found right = brute_force(scores, count, table.n, k);
                    for (const Kernels* kernels : tested_kernels())
                        for (int threads : THREADS) {
                            if (k > 10 && threads == 2) continue;
                            scenario = name + ", metric " + std::to_string(int(metric)) + ", k " +
                                       std::to_string(k) + ", prefix " + std::to_string(prefix) +
                                       (coded ? " coded, " : ", ") + kernels->name + ", " +
                                       std::to_string(threads) + " threads";
                            check_found(
                                find(*kernels, database, queries, metric, k, threads, visits),
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
    const Found right = brute_force(scores64(table, queries, Metric::COSINE), 100, table.n, 10);
    Visits visits;
    for (bool coded : {false, true}) {
        const Database database(table, {100, coded}, split(table.n), table.n, kernels, 1);
        check_found(find(kernels, database, queries, Metric::COSINE, 10, 2, &visits), right);
    }
}

Table scaled(const Table& table, const std::vector<float>& factors, DType dtype) {
    Table out = {table.n, table.width, dtype, table.values};
    for (int64_t row = 0; row < table.n; ++row)
        for (int64_t c = 0; c < table.width; ++c)
            out.set(row, c, table.row(row)[c] * factors[row % factors.size()]);
    return out;
}

void check_results(const Kernels& kernels, std::mt19937& random) {
    const Table table = make_table(200, 24, DType::F32, random);
    const QueryRows queries(table, 2, random);
    const Table huge = scaled(table, {1e20f}, DType::F32);
    const Database database(huge, {8, false}, split(200), 200, kernels, 1);
    Found found = room_for(2, 5);
    std::vector<int64_t> touched(2);
    CHECK(exact_search(kernels, database.rows, queries.queries, Metric::L2, 24, 5, 1,
                       found.scores.data(), found.ids.data(), touched.data()) == Status::OVERFLOW_);
}

}  // namespace

void test_exact() {
    std::mt19937 random(3);
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
            CHECK(search(kernels, database.rows, queries.queries, Metric::COSINE,
                         {{12, 400}, {48, 10}}, 2, found.scores.data(),
                         found.ids.data()) == Status::OK);
            return found;
        };
        const auto exact = [&] {
            Visits visits;
            return find(kernels, database, queries, Metric::COSINE, 10, 2, &visits);
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
