// Search against fp64. All scores of a prefix, each within its budget, say what any search of it
// has to return, to the bit: for every k, funnel, rerank, and number of threads.
#include <map>

#include "vectors.h"

namespace {

struct Case {
    const Table& table;
    const QueryRows& queries;
    const Database& database;
    Metric metric;
};

Found find(const Case& c, const Kernels& kernels, const std::vector<Stage>& stages, int threads) {
    Found found = room_for(c.queries.queries.n, stages.back().keep);
    CHECK(search({kernels, threads}, c.database.rows, c.queries.queries, c.metric, stages,
                 {found.scores.data(), found.ids.data()}) == Status::OK);
    return found;
}

// [queries, n] fp64 scores, and how far one of a chain of fp32 sums may be off.
struct Exact {
    std::vector<double> score, budget;
};

UNWATCHED Exact exact_scores(const Case& c, int64_t dim) {
    const int64_t n = c.table.n, count = c.queries.queries.n;
    const MetricTerms& terms = terms_of(c.metric);
    Exact out = {std::vector<double>(count * n), std::vector<double>(count * n)};
    for (int64_t q = 0; q < count; ++q)
        for (int64_t row = 0; row < n; ++row) {
            const float *a = c.queries.row(q), *b = c.table.row(row);
            double dot = 0.0, size = 0.0, aa = 0.0, bb = 0.0, square = 0.0;
            for (int64_t i = 0; i < dim; ++i) {
                const double x = a[i], y = b[i];
                dot += x * y;
                size += std::abs(x * y);
                aa += x * x;
                bb += y * y;
                square += (x - y) * (x - y);
            }
            const double norms = std::sqrt(aa) * std::sqrt(bb), steps = double(dim) * ROUNDING;
            double score = dot, budget = size * (steps + 3 * ROUNDING);
            if (terms.source == Source::DIFFERENCE) {
                score = -square;
                budget = square * (steps + 5 * ROUNDING);
            } else if (terms.normalized) {
                score = norms > 0.0 ? dot / norms : 0.0;
                budget =
                    norms > 0.0 ? (size / norms + std::abs(score)) * (steps + 13 * ROUNDING) : 0.0;
            }
            const double factor = terms.factor(terms.source);
            out.score[q * n + row] = factor * score;
            out.budget[q * n + row] = factor * (1.01 * budget + 1e-37);
        }
    return out;
}

// The result, by a prefix, of a search that returns every row.
struct Ranking {
    Found found;                // [queries, n]
    std::vector<float> scores;  // likewise, by row
    bool operator==(const Ranking& other) const { return found == other.found; }
};
using Rankings = std::map<int64_t, Ranking>;  // by dim

Ranking rank_all(const Case& c, const Kernels& kernels, int64_t dim) {
    const int64_t n = c.table.n;
    Ranking ranking = {find(c, kernels, {{dim, n}}, 1), {}};
    const Found& found = ranking.found;
    ranking.scores.assign(found.scores.size(), NAN);
    for (size_t i = 0; i < found.ids.size(); ++i) {
        const int64_t at = int64_t(i) / n * n + found.ids[i];
        CHECK(found.ids[i] >= 0 && found.ids[i] < n);
        CHECK(std::isnan(ranking.scores[at]));  // a row is there once
        ranking.scores[at] = found.scores[i];
        if (i % n == 0) continue;
        CHECK(found.scores[i] < found.scores[i - 1] ||
              (found.scores[i] == found.scores[i - 1] && found.ids[i] > found.ids[i - 1]));
    }
    return ranking;
}

void check_scores(const Ranking& ranking, const Exact& exact) {
    for (size_t i = 0; i < exact.score.size(); ++i)
        CHECK_NEAR(ranking.scores[i], exact.score[i], exact.budget[i]);
}

// What the stages leave of each query's candidates: [queries, keep of the last stage].
Found funnel(const Case& c, const Rankings& rankings, const std::vector<Stage>& stages,
             std::vector<std::vector<int64_t>> candidates) {
    const int64_t n = c.table.n, k = stages.back().keep;
    Found found = none(c.queries.queries.n, k);
    for (int64_t q = 0; q < c.queries.queries.n; ++q) {
        std::vector<int64_t>& rows = candidates[q];
        const float* scores = nullptr;
        for (const Stage& stage : stages) {
            scores = rankings.at(stage.dim).scores.data() + q * n;
            keep_best(&rows, stage.keep, [&](int64_t row) { return scores[row]; });
        }
        for (size_t i = 0; i < rows.size(); ++i) {
            found.ids[q * k + i] = rows[i];
            found.scores[q * k + i] = scores[rows[i]];
        }
    }
    return found;
}

Found expected(const Case& c, const Rankings& rankings, const std::vector<Stage>& stages) {
    const int64_t n = c.table.n, keep = std::min(stages[0].keep, n);
    const std::vector<int64_t>& ids = rankings.at(stages[0].dim).found.ids;
    std::vector<std::vector<int64_t>> shortlists;
    for (int64_t q = 0; q < c.queries.queries.n; ++q)
        shortlists.emplace_back(ids.begin() + q * n, ids.begin() + q * n + keep);
    return funnel(c, rankings, stages, shortlists);
}

// Scores by int8 codes, up to a factor of the query: [n].
std::vector<double> code_scores(const Case& c, int64_t q) {
    const Rows& rows = c.database.rows;
    const float* query = c.queries.row(q);
    const MetricTerms& terms = terms_of(c.metric);
    const int64_t quads = (rows.code_dim + 3) / 4;
    float largest = 0.0f;
    for (int64_t i = 0; i < rows.code_dim; ++i) largest = std::max(largest, std::abs(query[i]));
    const float units = largest > 0.0f ? 127.0f / largest : 0.0f;
    std::vector<double> scores;
    for (const Span& span : rows.spans)
        for (int64_t row = 0; row < span.rows; ++row) {
            int64_t sum = 0;
            for (int64_t i = 0; i < rows.code_dim; ++i) {
                const int64_t quad = (row / TILE * quads + i / 4) * TILE + row % TILE;
                sum += std::lrint(query[i] * units) * (span.codes[quad * 4 + i % 4] - 128);
            }
            const float* stats = span.stats + row;
            const double norm = stats[PREFIX_NORM * span.stats_stride];
            double score = double(sum) * stats[CODE_SCALE * span.stats_stride] * largest / 127.0;
            if (terms.normalized) score = norm > 0.0 ? score / norm : 0.0;
            scores.push_back(terms.product * score - terms.squares * norm * norm);
        }
    return scores;
}

// A shortlist by codes, reranked: right but for rows whose code scores are too close to tell.
void check_coded(const Case& c, const Ranking& ranking, const std::vector<std::vector<double>>& all,
                 int64_t shortlist, int64_t k, const Found& found) {
    const int64_t n = c.table.n, keep = std::min(shortlist, n), count = std::min(k, keep);
    for (int64_t q = 0; q < c.queries.queries.n; ++q) {
        const std::vector<double>& codes = all[q];
        std::vector<double> sorted = codes;
        std::nth_element(sorted.begin(), sorted.begin() + keep - 1, sorted.end(),
                         std::greater<double>());
        const double least = sorted[keep - 1], close = 1e-5 * (std::abs(least) + 1.0);
        const float* scores = ranking.scores.data() + q * n;
        const int64_t* ids = found.ids.data() + q * k;
        const auto better = [&](int64_t a, int64_t b) {
            return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
        };
        for (int64_t i = 0; i < k; ++i) {
            CHECK_EQUAL(ids[i] >= 0, i < count);
            if (i >= count) continue;
            CHECK_EQUAL(found.scores[q * k + i], scores[ids[i]]);
            CHECK(i == 0 || better(ids[i - 1], ids[i]));
            CHECK(codes[ids[i]] >= least - close);
        }
        for (int64_t row = 0; row < n; ++row)
            if (codes[row] > least + close && better(row, ids[count - 1]))
                CHECK(std::find(ids, ids + count, row) != ids + count);
    }
}

// Candidates for rerank, some of which are −1, none.
struct Shortlists {
    static constexpr int64_t COUNT = 70;
    Shortlists(const Case& c, std::mt19937& random)
        : ids(c.queries.queries.n * COUNT, -1), rows(c.queries.queries.n) {
        const int64_t n = c.table.n;
        for (size_t q = 0; q < rows.size(); ++q)
            for (int64_t i = q % 3, row = random() % n; i < COUNT && row < n;
                 ++i, row += 1 + n / 90)
                rows[q].push_back(ids[q * COUNT + i] = row);
    }
    std::vector<int64_t> ids;                // [queries, COUNT]
    std::vector<std::vector<int64_t>> rows;  // without the −1
};

Found find_among(const Case& c, const Kernels& kernels, const Shortlists& candidates, Stage stage,
                 int threads) {
    Found found = room_for(c.queries.queries.n, stage.keep);
    CHECK(rerank({kernels, threads}, c.database.rows, c.queries.queries, c.metric,
                 {candidates.ids.data(), Shortlists::COUNT}, stage,
                 {found.scores.data(), found.ids.data()}) == Status::OK);
    return found;
}

// Instruction sets that agree to the bit: those with multiply-adds, and the others.
std::vector<std::vector<const Kernels*>> alike() {
    std::vector<std::vector<const Kernels*>> sets(2);
    for (const Kernels* kernels : tested_kernels())
        sets[std::string(kernels->name) == "portable"].push_back(kernels);
    if (sets[0].empty()) sets.erase(sets.begin());
    return sets;
}

void check_case(const Case& c, Layout layout, std::mt19937& random) {
    const int64_t width = c.table.width, n = c.table.n;
    const int64_t first = layout.prefix ? layout.prefix : width / 3, middle = (first + width) / 2;
    const int64_t most = std::min<int64_t>(n, 500);
    std::vector<std::vector<Stage>> searches = {
        {{width, 1}}, {{middle, 10}}, {{width, 100}}, {{first, most + 5}}};
    if (!layout.coded) {
        searches.push_back({{first, 200}, {width, 10}});
        searches.push_back({{first, 100}, {middle, 30}, {width, 7}});
        searches.push_back({{first, most + 1}, {width, most}});
    }
    std::vector<std::vector<double>> codes;
    for (int64_t q = 0; layout.coded && q < c.queries.queries.n; ++q)
        codes.push_back(code_scores(c, q));
    const Shortlists candidates(c, random);
    const Stage last = {width, 40};
    const std::string name = scenario;
    for (const std::vector<const Kernels*>& kernels : alike()) {
        Rankings rankings;
        for (int64_t dim : {first, middle, width}) {
            rankings[dim] = rank_all(c, *kernels[0], dim);
            check_scores(rankings[dim], exact_scores(c, dim));
        }
        const auto each = [&](const Found& right, const auto& found) {
            for (const Kernels* one : kernels)
                for (int threads : THREADS) {
                    scenario =
                        name + ", " + one->name + ", " + std::to_string(threads) + " threads";
                    CHECK_EQUAL(found(*one, threads), right);
                }
        };
        for (const std::vector<Stage>& stages : searches)
            each(expected(c, rankings, stages),
                 [&](const Kernels& one, int threads) { return find(c, one, stages, threads); });
        for (int64_t keep : {int64_t(1), int64_t(50), most})
            for (int64_t k : {1, 20}) {
                if (!layout.coded) continue;
                const std::vector<Stage> stages = {{first, keep}, {width, k}};
                const Found found = find(c, *kernels[0], stages, 1);
                check_coded(c, rankings[width], codes, keep, k, found);
                each(found, [&](const Kernels& one, int threads) {
                    return find(c, one, stages, threads);
                });
            }
        if (!c.database.rows.packed_dim)
            each(funnel(c, rankings, {last}, candidates.rows),
                 [&](const Kernels& one, int threads) {
                     return find_among(c, one, candidates, last, threads);
                 });
    }
}

void check_duplicates(const Kernels& kernels, std::mt19937& random) {
    const Table one = make_table(1, 21, DType::F32, random);
    Table table = {1000, 21, DType::F32, {}};
    for (int64_t row = 0; row < table.n; ++row)
        table.values.insert(table.values.end(), one.values.begin(), one.values.end());
    const QueryRows queries(table, 8, random);
    for (Layout layout : {Layout{0, false}, Layout{9, false}, Layout{9, true}})
        for (Metric metric : METRICS) {
            const Database database(table, layout, split(table.n), table.n, kernels, 1);
            for (const std::vector<Stage>& stages :
                 {std::vector<Stage>{{21, 33}}, std::vector<Stage>{{9, 100}, {21, 33}}})
                for (int threads : THREADS) {
                    const Found found =
                        find({table, queries, database, metric}, kernels, stages, threads);
                    for (size_t i = 0; i < found.ids.size(); ++i)
                        CHECK_EQUAL(found.ids[i], int64_t(i) % 33);
                }
        }
}

// Results name rows by their ids where there are any.
void check_ids(const Kernels& kernels, std::mt19937& random) {
    const Table table = make_table(300, 20, DType::F32, random);
    const QueryRows queries(table, 7, random);
    const Database database(table, {0, false}, split(table.n), table.n, kernels, 1);
    std::vector<int64_t> ids(table.n);
    for (int64_t row = 0; row < table.n; ++row) ids[row] = (row * 7 + 1) % table.n + (1ll << 40);
    const Case c = {table, queries, database, L2};
    Database named(table, {0, false}, split(table.n), table.n, kernels, 1);
    for (Span& span : named.rows.spans) span.ids = ids.data() + span.first;
    Found found = find(c, kernels, {{10, 50}, {20, 310}}, 1);
    const Found renamed = find({table, queries, named, L2}, kernels, {{10, 50}, {20, 310}}, 1);
    for (int64_t& id : found.ids) id = id < 0 ? id : ids[id];
    CHECK_EQUAL(renamed, found);
}

// Vectors so wide that the queries take two passes, which are not two halves.
void check_passes(const Kernels& kernels, std::mt19937& random) {
    const Table table = make_table(65, 1400, DType::F16, random);
    const QueryRows queries(table, 100, random);
    const Database database(table, {600, false}, split(table.n), table.n, kernels, 1);
    const std::vector<Stage> stages = {{1300, 20}, {1400, 10}};
    const Found whole = find({table, queries, database, COSINE}, kernels, stages, 2);
    Found halves = room_for(100, 10);
    for (int64_t half = 0; half < 2; ++half)
        CHECK(search({kernels, 1}, database.rows, queries.some(half * 50, 50), COSINE, stages,
                     {halves.scores.data() + half * 500, halves.ids.data() + half * 500}) ==
              Status::OK);
    CHECK_EQUAL(whole, halves);
}

// NaN and infinite values in any stage, and scores beyond fp32.
void check_refusals(const Kernels& kernels, std::mt19937& random) {
    for (DType dtype : DTYPES)
        for (float bad : {NAN, INFINITY, -INFINITY})
            for (int64_t column : {0, 17, 30}) {
                Table table = make_table(130, 31, dtype, random);
                const QueryRows queries(table, 7, random);
                table.set(129, column, bad);
                const Database database(table, {0, false}, {table.n}, table.n, kernels, 1);
                Found found = room_for(7, 130);
                std::vector<int64_t> rows(7 * 130);
                for (int64_t i = 0; i < 7 * 130; ++i) rows[i] = i % 130;
                for (Metric metric : METRICS) {
                    for (int64_t first : {5, 31})
                        CHECK(search({kernels, 1}, database.rows, queries.queries, metric,
                                     {{first, 130}, {31, 130}},
                                     {found.scores.data(), found.ids.data()}) ==
                              Status::NOT_FINITE);
                    CHECK(rerank({kernels, 1}, database.rows, queries.queries, metric,
                                 {rows.data(), 130}, {31, 130},
                                 {found.scores.data(), found.ids.data()}) == Status::NOT_FINITE);
                }
            }
    Table table = make_table(130, 31, DType::F32, random);
    const QueryRows queries(table, 7, random);
    for (int64_t c = 0; c < 31; ++c) table.set(64, c, 3e38f);
    const Database database(table, {0, false}, {table.n}, table.n, kernels, 1);
    Found found = room_for(7, 130);
    CHECK(search({kernels, 1}, database.rows, queries.queries, L2, {{31, 130}},
                 {found.scores.data(), found.ids.data()}) == Status::OVERFLOW_);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        std::vector<float> query(2 * 31);
        query[61] = bad;
        CHECK(search({kernels, 1}, database.rows, {query.data(), 2, 31}, IP, {{5, 9}, {31, 3}},
                     {found.scores.data(), found.ids.data()}) == Status::QUERY_NOT_FINITE);
    }
}

// Layouts 0, 1 and 2: row-major, tiles, codes.
void check_table(int64_t n, int64_t width, int layout, DType dtype, Metric metric,
                 const std::vector<int64_t>& counts, std::mt19937& random) {
    const Layout laid_out = {layout ? width * 2 / 5 : 0, layout == 2};
    const Table table = make_table(n, width, dtype, random);
    const Database database(table, laid_out, split(n), 77, *tested_kernels().back(), 1);
    for (int64_t count : counts) {
        scenario = "search, " + std::to_string(n) + " rows of " + std::to_string(width) +
                   ", layout " + std::to_string(layout) + ", dtype " + std::to_string(int(dtype)) +
                   ", metric " + std::to_string(int(metric)) + ", " + std::to_string(count) +
                   " queries";
        const QueryRows queries(table, count, random);
        check_case({table, queries, database, metric}, laid_out, random);
    }
}

}  // namespace

void test_search() {
    std::mt19937 random(2);
    const int64_t sizes[] = {1, 63, 64, 65, 1000, 5000}, widths[] = {17, 40, 23, 64, 51, 38},
                  counts[] = {130, 29, 7, 6, 5, 29};
    for (int size = RACES_ONLY ? 5 : 0; size < 6; ++size)  // 5000 rows are worth several threads
        for (int layout = 0; layout < 3; ++layout)
            for (Metric metric : METRICS) {
                if (RACES_ONLY && int(metric) % 3 != layout) continue;
                check_table(sizes[size], widths[(size + layout) % 6], layout,
                            DTYPES[(size + layout + int(metric)) % 3], metric,
                            {0, 1, std::min(counts[(size + layout) % 6], 350000 / sizes[size])},
                            random);
            }
    for (const Kernels* kernels : tested_kernels()) {
        if (RACES_ONLY) break;
        scenario = std::string("search, ") + kernels->name;
        check_duplicates(*kernels, random);
        check_ids(*kernels, random);
        check_passes(*kernels, random);
        check_refusals(*kernels, random);
    }
}
