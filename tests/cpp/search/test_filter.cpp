// Search where a mask says which rows may be found: to the bit as if there were no others.
#include "search/chains.h"
#include "search/exact.h"
#include "search/masks.h"

namespace {

Found find(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
           const std::vector<Stage>& stages, int threads) {
    Found found = room_for(queries.n, stages.back().keep);
    CHECK(search({kernels, threads}, rows, queries, metric, stages,
                 {found.scores.data(), found.ids.data()}) == Status::OK);
    return found;
}

// A query alone finds what it finds among many.
void check_alone(const Kernels& kernels, const Rows& rows, const QueryRows& queries, Metric metric,
                 const std::vector<Stage>& stages, const Found& all) {
    const int64_t k = stages.back().keep;
    for (int64_t q = 0; q < queries.queries.n; q += 3) {
        const Found one = find(kernels, rows, queries.some(q, 1), metric, stages, 1);
        const Found right = {{all.scores.begin() + q * k, all.scores.begin() + (q + 1) * k},
                             {all.ids.begin() + q * k, all.ids.begin() + (q + 1) * k}};
        CHECK_EQUAL(one, right);
    }
}

// Layouts 0, 1 and 2: row-major, tiles, codes.
void check_table(int64_t n, int64_t width, int layout, DType dtype, Metric metric, int64_t count,
                 std::mt19937& random) {
    const int64_t prefix = width * 2 / 5, middle = (prefix + width) / 2;
    const Table table = make_table(n, width, dtype, random);
    const QueryRows queries(table, count, random);
    const Database database(table, {layout ? prefix : 0, layout == 2}, split(n), 77,
                            *tested_kernels().back(), 1);
    const std::string name = "filter, " + std::to_string(n) + " rows of " + std::to_string(width) +
                             ", layout " + std::to_string(layout) + ", metric " +
                             std::to_string(int(metric)) + ", ";
    const std::vector<std::vector<Stage>> searches = {{{width, 10}},
                                                      {{prefix, 45}, {width, 5}},
                                                      {{prefix, 6}, {width, 5}},
                                                      {{prefix, n + 9}, {middle, n + 2}}};
    std::map<bool, Chains> chains;
    for (const Kernels* kernels : tested_kernels())
        chains.try_emplace(fuses(*kernels), *kernels, table, queries, metric);
    for (const NamedRows& named : densities(database.rows, random)) {
        const Filtered filtered(database.rows, named.rows, random);
        const bool coded = layout == 2 && !TileReader::gathers(filtered.rows, Source::PRODUCT);
        for (const std::vector<Stage>& stages : searches) {
            const Rows* codes = coded && stages[0].dim == prefix ? &filtered.rows : nullptr;
            std::map<bool, Found> right;
            for (auto& [fused, mine] : chains)
                right[fused] = mine.best(filtered.chosen.rows, stages, codes);
            for (const Kernels* kernels : tested_kernels()) {
                scenario = name + named.name + ", " + kernels->name;
                const Found found =
                    find(*kernels, filtered.rows, queries.queries, metric, stages, 1);
                CHECK_EQUAL(found, right[fuses(*kernels)]);
                check_alone(*kernels, filtered.rows, queries, metric, stages, found);
            }
        }
    }
}

// So many queries, or so many rows, that several threads share them. All layouts find the same
// rows, unless codes rank them, which they do not where rows are few.
void check_threads(std::mt19937& random) {
    const Table table = make_table(8000, 110, DType::BF16, random);
    const QueryRows queries(table, 400, random);
    const Kernels& kernels = *tested_kernels().front();
    std::vector<std::unique_ptr<Database>> databases;
    for (Layout layout : {Layout{0, false}, Layout{100, false}, Layout{100, true}})
        databases.emplace_back(new Database(table, layout, split(table.n), table.n, kernels, 2));
    const int64_t few = most_gathered(databases[0]->rows);
    for (int64_t count : {few, few + 1, table.n / 2}) {
        const std::vector<int64_t> rows = some_rows(table.n, count, random);
        Found first;
        for (int layout : {0, 1, 2})
            for (int threads : {1, 2, 4}) {
                scenario = "filter, layout " + std::to_string(layout) + ", " +
                           std::to_string(count) + " rows, " + std::to_string(threads) + " threads";
                const Filtered filtered(databases[layout]->rows, rows, random);
                const Found found =
                    find(kernels, filtered.rows, queries.some(0, count == few ? 400 : 30), L2,
                         {{100, 9}, {110, 9}}, threads);
                for (int64_t id : found.ids) CHECK(filtered.chosen.has(id));
                if (threads == 1 && (layout == 0 || (layout == 2 && count > few))) first = found;
                CHECK_EQUAL(found, first);
            }
    }
}

}  // namespace

void test_filter() {
    std::mt19937 random(7);
    const int64_t sizes[] = {1, 130, 2100}, widths[] = {10, 33, 40};
    for (int size = 0; size < 3 && !RACES_ONLY; ++size)
        for (int layout = 0; layout < 3; ++layout)
            for (Metric metric : EVERY_METRIC)
                check_table(sizes[size], widths[size], layout,
                            DTYPES[(size + layout + int(metric)) % 3], metric, size == 2 ? 7 : 4,
                            random);
    check_threads(random);
}
