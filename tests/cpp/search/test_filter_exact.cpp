// Certified exact search of the rows of a mask, by bounds, in full, and gathered.
#include "search/exact.h"
#include "search/masks.h"

namespace {

void check_masks(const Table& table, const QueryRows& queries, Layout layout, Metric metric,
                 const std::vector<int>& threads, std::mt19937& random, Visits* visits) {
    const int64_t count = queries.queries.n, n = table.n;
    const std::vector<double> scores = scores64(table, queries, metric);
    const Database database(table, layout, split(n), 77, *tested_kernels().front(), 1);
    const std::string name = scenario + ", prefix " + std::to_string(layout.prefix) +
                             (layout.coded ? " coded" : "") + ", metric " +
                             std::to_string(int(metric)) + ", ";
    for (const NamedRows& named : densities(database.rows, random)) {
        const Filtered filtered(database.rows, named.rows, random);
        const int64_t eligible = filtered.rows.eligible();
        for (int64_t k : {int64_t(1), int64_t(10), eligible + 3}) {
            if (k > 1000) continue;
            const Found right = brute_force(scores, count, n, filtered.chosen.rows, k);
            for (const Kernels* kernels : tested_kernels())
                for (int some : threads) {
                    scenario = name + named.name + ", k " + std::to_string(k) + ", " +
                               kernels->name + ", " + std::to_string(some) + " threads";
                    Visits now;
                    check_found(find_exact(*kernels, filtered.rows, queries, metric, k, some, &now),
                                right);
                    if (eligible <= n / 4) continue;
                    visits->pruned += now.pruned;
                    visits->full += now.full;
                }
        }
    }
}

// Vectors so wide that the queries take two passes; a query alone finds the same as in either.
void check_passes(std::mt19937& random) {
    const Kernels& kernels = *tested_kernels().front();
    const Table table = make_table(300, 1400, DType::BF16, random);
    const QueryRows queries(table, 100, random);
    const std::vector<double> scores = scores64(table, queries, COSINE);
    for (bool coded : {false, true})
        for (int64_t some : {3, 150, 290}) {
            scenario = "exact of masks, passes, " + std::to_string(some) + " rows";
            const Database database(table, {100, coded}, split(table.n), table.n, kernels, 1);
            const Filtered filtered(database.rows, some_rows(table.n, some, random), random);
            const Found right = brute_force(scores, 100, table.n, filtered.chosen.rows, 5);
            Visits visits;
            check_found(find_exact(kernels, filtered.rows, queries, COSINE, 5, 2, &visits), right);
            const QueryRows one(table.width, {queries.row(99), queries.row(99) + table.width});
            check_found(find_exact(kernels, filtered.rows, one, COSINE, 5, 1, &visits),
                        {{right.scores.end() - 5, right.scores.end()},
                         {right.ids.end() - 5, right.ids.end()}});
        }
}

// Vectors without structure that bounds could use: half of the rows are gathered, and all scored.
void check_full(std::mt19937& random) {
    scenario = "exact of masks, noise";
    Table table = {9000, 48, DType::F16, std::vector<float>(9000 * 48)};
    for (int64_t row = 0; row < table.n; ++row)
        for (int64_t c = 0; c < table.width; ++c) table.set(row, c, uniform(random));
    const QueryRows queries(table, 24, random);
    for (bool coded : {false, true}) {
        const Kernels& kernels = *tested_kernels().front();
        const Database database(table, {12, coded}, split(table.n), table.n, kernels, 1);
        for (Metric metric : METRICS) {
            const Filtered filtered(database.rows, some_rows(table.n, 4400, random), random);
            const Found right = brute_force(scores64(table, queries, metric), 24, table.n,
                                            filtered.chosen.rows, 20);
            for (int threads : {1, 4}) {
                Visits visits;
                check_found(
                    find_exact(kernels, filtered.rows, queries, metric, 20, threads, &visits),
                    right);
                CHECK(visits.full > 0);
            }
        }
    }
}

}  // namespace

void test_filter_exact() {
    std::mt19937 random(8);
    check_passes(random);
    check_full(random);
    if (RACES_ONLY) return;
    Visits visits;
    const struct {
        int64_t n, width, queries, prefix;
    } sizes[] = {{1, 12, 2, 5}, {130, 30, 3, 30}, {2100, 37, 7, 10}};
    for (size_t i = 0; i < std::size(sizes); ++i)
        for (bool coded : {false, true})
            for (Metric metric : METRICS) {
                const auto [n, width, count, prefix] = sizes[i];
                const Table table = make_table(n, width, DTYPES[i], random);
                scenario = "exact of masks, " + std::to_string(n) + " rows";
                check_masks(table, QueryRows(table, count, random), {prefix, coded}, metric, {1},
                            random, &visits);
            }
    CHECK(visits.pruned > 0 && visits.full > 0);  // both ways were taken
    Table same = make_table(2500, 32, DType::F32, random);
    for (int64_t row = 1; row < same.n; ++row)
        std::copy_n(same.row(0), 32, same.values.begin() + row * 32);
    for (bool coded : {false, true}) {
        scenario = "exact of masks, one row again and again";
        check_masks(same, QueryRows(same, 7, random), {8, coded}, METRICS[coded], {1, 2}, random,
                    &visits);
    }
}
