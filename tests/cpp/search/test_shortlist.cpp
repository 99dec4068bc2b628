// Which way exact search takes where rows score alike: every way finds the right rows, and these
// are the fast ones.
#include <set>

#include "cpu/search/equal_rows.h"
#include "cpu/search/shortlist.h"
#include "search/exact.h"

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
            CHECK(scan_narrow(p, database.rows, ordinary, make, 2, &undecided, &best) ==
                  Status::OK);
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

}  // namespace

void test_shortlist() {
    std::mt19937 random(17);
    check(beside(1, 1.0f, random), false, false, random);
    check(beside(1, 1e-6f, random), true, false, random);
    check(beside(8, 1e-6f, random), true, true, random);
    scenario = "equal rows";
    const Table table = beside(10, 0.0f, random);
    const Database database(table, {13, false}, split(ROWS), 77, *tested_kernels().front(), 1);
    std::set<std::vector<float>> different;
    for (int64_t row = 0; row < ROWS; ++row)
        different.emplace(table.row(row), table.row(row) + WIDTH);
    CHECK(different.size() <= 10);
    const EqualRows equal(*tested_kernels().front(), database.rows, WIDTH, 2);
    CHECK_EQUAL(equal.count(), int64_t(different.size()));
}
