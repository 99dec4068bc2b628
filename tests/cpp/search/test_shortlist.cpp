// Which way exact search takes where rows score alike: every way finds the right rows, and these
// are the fast ones.
#include <set>

#include "cpu/search/clusters.h"
#include "cpu/search/equal_rows.h"
#include "cpu/search/shortlist.h"
#include "search/exact.h"
#include "search/masks.h"

namespace {

constexpr int64_t ROWS = 3000, WIDTH = 48, QUERIES = 7, K = 10;

// Rows each of which differs from one of so many centres by this share.
Table beside(int64_t centres, float share, std::mt19937& random) {
    const Table centre = make_table(64, WIDTH, DType::F32, random);
    Table table = make_table(ROWS, WIDTH, DType::F32, random);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t c = 0; c < WIDTH; ++c)
            table.set(row, c, centre.row(32 + row % centres)[c] + share * uniform(random));
    return table;
}

void check(const Table& table, bool alike_by_scores, bool alike_by_differences,
           std::mt19937& random) {
    const Kernels& kernels = *tested_kernels().front();
    const QueryRows queries(make_table(40, WIDTH, DType::F32, random), QUERIES, random);
    const Database database(table, {13, false}, split(ROWS), 77, kernels, 1);
    std::vector<int64_t> which(QUERIES);
    std::iota(which.begin(), which.end(), 0);
    for (Metric metric : EVERY_METRIC) {
        scenario = "shortlists, metric " + std::to_string(int(metric));
        const std::vector<double> scores = scores64(table, queries, metric);
        const Found right = brute_force(scores, QUERIES, ROWS, all_rows(ROWS), K);
        const auto run = [&](MakeShortlist make, bool expected) {
            Problem p(kernels, database.rows, queries.queries, metric, WIDTH, K);
            // The query of zeros scores all rows alike, and its norm bounds nothing.
            std::vector<int64_t> ordinary = which, undecided;
            ordinary.erase(ordinary.begin() + 2);
            bool alike;
            CHECK(sees_alike(p, database.rows, ordinary, make, 2, &alike) == Status::OK);
            CHECK_EQUAL(alike, expected);
            std::vector<std::vector<Final>> best(QUERIES);
            CHECK(scan_narrow(p, database.rows, ordinary, make, last_length(p), 2, &undecided,
                              &best) == Status::OK);
            CHECK_EQUAL(undecided.empty(), !expected);
            for (int64_t q : ordinary) {
                if (expected) continue;
                std::sort(best[q].begin(), best[q].end());
                for (int64_t i = 0; i < K; ++i) CHECK_EQUAL(best[q][i].row, right.ids[q * K + i]);
            }
        };
        run(shortlist_by_scores, alike_by_scores);
        run(shortlist_by_differences, alike_by_differences);
    }
}

// Clusters around vectors, of rows that a mask leaves, and some rows that are in none.
void check_clusters(int64_t k, std::mt19937& random) {
    constexpr int64_t N = 2 * ROWS;
    const Table centre = make_table(20, WIDTH, DType::F32, random);  // the fourth is 0
    const Table others = make_table(N, WIDTH, DType::F32, random);
    Table table = others;
    for (int64_t row = 0; row < N; ++row)
        for (int64_t c = 0; c < WIDTH && row % 50; ++c)
            table.set(row, c, centre.row(4 + row % 16)[c] + 1e-6f * uniform(random));
    const Kernels& kernels = *tested_kernels().front();
    const QueryRows queries(make_table(40, WIDTH, DType::F32, random), QUERIES, random);
    const Database database(table, {13, false}, split(N), 77, kernels, 1),
        apart(others, {13, false}, split(N), 77, kernels, 1);
    const Chosen some(database.rows, some_rows(N, N * 6 / 7, random));
    for (Metric metric : EVERY_METRIC)
        for (const Rows& rows : {database.rows, database.rows.restricted(some.words.data())}) {
            scenario = "clusters, metric " + std::to_string(int(metric));
            const Found right = brute_force(scores64(table, queries, metric), QUERIES, N,
                                            rows.mask ? some.rows : all_rows(N), k);
            const std::vector<int64_t> which = {0, 1, 3, 4, 5, 6};  // query 2 is 0
            Problem p(kernels, rows, queries.queries, metric, WIDTH, k);
            Clusters clusters(p, project({kernels, 2}, rows, WIDTH), 2);
            CHECK(clusters.narrow(p, which));
            std::vector<std::vector<Final>> best(QUERIES);
            CHECK(clusters.search(p, 2, &best) == Status::OK);
            for (int64_t q : which) {
                CHECK(p.touched[q] < rows.eligible() / 2);
                std::sort(best[q].begin(), best[q].end());
                for (int64_t i = 0; i < k; ++i) CHECK_EQUAL(best[q][i].row, right.ids[q * k + i]);
            }
            Problem none(kernels, apart.rows, queries.queries, metric, WIDTH, k);
            const std::vector<Projected> sorted = project({kernels, 2}, apart.rows, WIDTH);
            CHECK(!Clusters(none, sorted, 2).narrow(none, which));
        }
}

// Copies of vectors, of which some differ from one in the order of two columns only: many of those
// have its sums.
void check_equal_rows(std::mt19937& random) {
    constexpr int64_t VECTORS = 40, TWINS = 10, MANY = 20;
    Table table = make_table(ROWS, WIDTH, DType::F32, random);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t c = 0, vector = row % VECTORS; c < WIDTH; ++c) {
            const int64_t at = vector >= TWINS ? c : c == 0 ? vector : c == vector ? 0 : c;
            table.set(row, c, float((at + 1) * (at + std::max<int64_t>(vector, TWINS)) % 61));
        }
    const Kernels& kernels = *tested_kernels().front();
    const QueryRows queries(make_table(MANY, WIDTH, DType::F32, random), MANY, random);
    const Database database(table, {13, false}, split(ROWS), 77, kernels, 1);
    const std::vector<Projected> sorted = project({kernels, 2}, database.rows, WIDTH);
    std::set<std::pair<float, float>> sums;
    for (const Projected& row : sorted) sums.emplace(row.sum, row.other);
    CHECK(sums.size() > VECTORS - TWINS && sums.size() < VECTORS);
    for (Metric metric : EVERY_METRIC) {
        scenario = "equal rows, metric " + std::to_string(int(metric));
        Problem p(kernels, database.rows, queries.queries, metric, WIDTH, K);
        const EqualRows equal(p, sorted, 2);
        CHECK(equal.count() > VECTORS && equal.count() < ROWS / 2);
        const Found right =
            brute_force(scores64(table, queries, metric), MANY, ROWS, all_rows(ROWS), K);
        std::vector<float> scores(MANY * K);
        std::vector<int64_t> ids(MANY * K), touched(MANY);
        CHECK(exact_search({kernels, 2}, database.rows, queries.queries, metric, {WIDTH, K},
                           {scores.data(), ids.data()}, touched.data()) == Status::OK);
        CHECK(ids == right.ids);
    }
}

}  // namespace

void test_shortlist() {
    std::mt19937 random(17);
    check(beside(1, 1.0f, random), false, false, random);
    check(beside(1, 1e-6f, random), true, false, random);
    check(beside(8, 1e-6f, random), true, true, random);
    check_clusters(10, random);
    check_clusters(400, random);
    check_equal_rows(random);
    scenario = "few rows";
    const Table table = beside(10, 0.0f, random);
    const Database database(table, {13, false}, split(ROWS), 77, *tested_kernels().front(), 1);
    std::set<std::vector<float>> different;
    for (int64_t row = 0; row < ROWS; ++row)
        different.emplace(table.row(row), table.row(row) + WIDTH);
    CHECK(different.size() <= 10);
    const Kernels& kernels = *tested_kernels().front();
    const QueryRows queries(make_table(40, WIDTH, DType::F32, random), QUERIES, random);
    Problem p(kernels, database.rows, queries.queries, Metric(0), WIDTH, K);
    const EqualRows equal(p, project({kernels, 2}, database.rows, WIDTH), 2);
    CHECK_EQUAL(equal.count(), int64_t(different.size()));
}
