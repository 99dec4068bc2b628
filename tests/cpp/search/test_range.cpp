// Range search against brute force in fp64, at thresholds on some rows' scores and all around.
#include "search/exact.h"
#include "search/masks.h"

namespace {

// Some scores of the first query, the best and the worst among them, each with the next larger
// float; and thresholds beyond all scores.
std::vector<double> thresholds(const std::vector<double>& scores, int64_t n) {
    std::vector<double> sorted(scores.begin(), scores.begin() + n), out;
    std::sort(sorted.rbegin(), sorted.rend());
    for (int64_t rank : {int64_t(0), n / 50, n / 3, n - 1}) {
        const float score = float(sorted[rank]);
        out.insert(out.end(), {score, std::nextafter(score, INFINITY)});
    }
    out.insert(out.end(), {0.0, sorted[n / 10], -INFINITY, -1e300, 1e300, INFINITY, double(NAN)});
    return out;
}

void check_table(const Table& table, const QueryRows& queries, int64_t prefix,
                 std::mt19937& random) {
    const int64_t n = table.n, count = queries.queries.n;
    const std::string name = scenario;
    for (Metric metric : EVERY_METRIC) {
        const std::vector<double> scores = scores64(table, queries, metric);
        for (bool coded : {false, true}) {
            const Database database(table, {prefix, coded}, split(n), 77, *tested_kernels().front(),
                                    1);
            for (int64_t some : {n, n / 2, n / 90, int64_t(0)}) {
                const Filtered filtered(database.rows, some_rows(n, some, random), random);
                const Rows& rows = some == n ? database.rows : filtered.rows;
                for (double threshold : thresholds(scores, n)) {
                    const InRange right =
                        rows_in_range(scores, count, n, filtered.chosen.rows, threshold);
                    for (const Kernels* kernels : tested_kernels()) {
                        scenario = name + ", metric " + std::to_string(int(metric)) + ", " +
                                   std::to_string(some) + " rows" + (coded ? ", coded, " : ", ") +
                                   kernels->name + ", threshold " + std::to_string(threshold);
                        check_range({*kernels, 1}, rows, queries.queries, metric, table.width,
                                    threshold, scores, right);
                    }
                }
            }
        }
    }
}

// More queries than one pass takes, and more rows than one thread does.
void check_passes(std::mt19937& random) {
    const Kernels& kernels = *tested_kernels().front();
    const Table table = make_table(3000, 24, DType::F16, random);
    const QueryRows queries(table, 150, random);
    const std::vector<double> scores = scores64(table, queries, COSINE);
    for (bool coded : {false, true}) {
        const Database database(table, {16, coded}, split(table.n), table.n, kernels, 1);
        const InRange right = rows_in_range(scores, 150, table.n, all_rows(table.n), 0.9);
        for (int threads : {2, 4}) {
            scenario = "range, " + std::to_string(threads) + " threads";
            check_range({kernels, threads}, database.rows, queries.queries, COSINE, 24, 0.9, scores,
                        right);
        }
    }
}

// A score beyond fp32 is refused, unless its row may not be found; so are queries that are not
// finite.
void check_refusals(std::mt19937& random) {
    scenario = "range, refusals";
    const Kernels& kernels = *tested_kernels().front();
    Table table = make_table(200, 24, DType::F32, random);
    const QueryRows queries(table, 4, random);
    for (int64_t c = 0; c < 24; ++c) table.set(70, c, 1e20f);
    const Database database(table, {8, false}, split(200), 200, kernels, 1);
    std::vector<std::vector<Neighbour>> found;
    const auto status = [&](const Rows& rows, const Queries& some) {
        return range_search({kernels, 1}, rows, some, L2, 24, -1.0, &found);
    };
    CHECK(status(database.rows, queries.queries) == Status::OVERFLOW_);
    std::vector<int64_t> others = all_rows(200);
    others.erase(others.begin() + 70);
    const Filtered filtered(database.rows, others, random);
    CHECK(status(filtered.rows, queries.queries) == Status::OK);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        std::vector<float> query(24, 1.0f);
        query[23] = bad;
        CHECK(status(filtered.rows, {query.data(), 1, 24}) == Status::QUERY_NOT_FINITE);
    }
    CHECK(status(Rows{{}, 8, 0, DType::F32, {8, 16}}, queries.queries) == Status::OK);
    CHECK(found.size() == 4 && found[0].empty());
}

}  // namespace

void test_range() {
    std::mt19937 random(9);
    check_passes(random);
    if (RACES_ONLY) return;
    for (int64_t n : {1, 65, 1000}) {
        scenario = "range, " + std::to_string(n) + " rows";
        const Table table = make_table(n, 21, DTYPES[n % 3], random);
        check_table(table, QueryRows(table, n == 1000 ? 7 : 3, random), n == 65 ? 21 : 6, random);
    }
    const Table table = make_table(300, 21, DType::F32, random);
    const std::vector<std::vector<float>> factors = {
        {0.0f}, {1e-19f}, {1e-25f}, {1e18f}, {1.0f, 1e-19f, 0.0f, 1e-25f, 1e18f}};
    for (size_t i = 0; i < factors.size(); ++i) {
        scenario = "range, rows of extreme size " + std::to_string(i);
        const Table extreme = scaled(table, factors[i], DType::F32);
        check_table(extreme, QueryRows(extreme, 3, random), 6, random);
        scenario += ", queries too";
        std::vector<float> values(extreme.row(4), extreme.row(8));  // no noise on them
        check_table(extreme, QueryRows(21, values), 6, random);
    }
    check_refusals(random);
}
