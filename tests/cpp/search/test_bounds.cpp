// Exact search where each part of a bound is as large as it can be: a row whose error, or tail, is
// parallel to the query is found although its codes, or its prefix, say little of it.
#include "search/exact.h"

namespace {

constexpr int64_t WIDTH = 32, GOOD = 8;  // rows that are to be found

float sign(std::mt19937& random) { return random() % 2 ? 1.0f : -1.0f; }

// A vector along `signs`, all of whose columns but the first lie almost half a step beyond what
// int8 codes say.
std::vector<float> rounded_off(const std::vector<float>& signs, float fraction) {
    std::vector<float> x(WIDTH);
    for (int64_t c = 0; c < WIDTH; ++c) x[c] = signs[c] * (c ? 2.0f + fraction : 127.0f) / 127.0f;
    return x;
}

// A vector that its codes stand for exactly, along `signs` but for the first columns.
std::vector<float> flipped(const std::vector<float>& signs, int64_t count) {
    std::vector<float> x = signs;
    for (int64_t c = 1; c <= count; ++c) x[c] = -x[c];
    return x;
}

// All rows but the good ones point away from the query, in each column.
Table among_others(const std::vector<std::vector<float>>& good, const std::vector<float>& query,
                   std::mt19937& random) {
    Table table = make_table(2000, query.size(), DType::F32, random);
    for (size_t i = 0; i < table.values.size(); ++i)
        table.values[i] = -std::copysign(table.values[i], query[i % query.size()]);
    for (size_t i = 0; i < good.size(); ++i)
        std::copy(good[i].begin(), good[i].end(),
                  table.values.begin() + (100 + 171 * i) * table.width);
    return table;
}

void check(const std::string& name, const std::vector<std::vector<float>>& good,
           const std::vector<float>& query, int64_t prefix, bool coded, std::mt19937& random) {
    const Table table = among_others(good, query, random);
    const QueryRows queries(table.width, query);
    for (Metric metric : EVERY_METRIC) {
        const std::vector<double> scores = scores64(table, queries, metric);
        const Database database(table, {prefix, coded}, split(table.n), table.n,
                                *tested_kernels().front(), 1);
        for (int64_t k : {1, 3}) {
            const Found right = brute_force(scores, 1, table.n, all_rows(table.n), k);
            for (const Kernels* kernels : tested_kernels()) {
                scenario = "bounds, " + name + ", metric " + std::to_string(int(metric)) + ", k " +
                           std::to_string(k) + (coded ? ", coded, " : ", ") + kernels->name;
                Visits visits;
                check_found(find_exact(*kernels, database.rows, queries, metric, k, 1, &visits),
                            right);
                CHECK_EQUAL(visits.pruned, 1);  // by bounds
            }
        }
    }
}

// Rows so much alike that fp32 cannot tell which are the best: few of them, or more than a
// shortlist holds. They are searched by tiles alone, where every row is scored, and by bounds.
void check_close(int64_t close, int64_t prefix, bool coded, std::mt19937& random) {
    Table table = make_table(2000, 61, DType::F32, random);
    const QueryRows queries(table, 7, random);
    const std::vector<float> apart = QueryRows(table, 1, random).values;
    for (int64_t i = 0; i < close; ++i)
        for (int64_t c = 0; c < table.width; ++c) {
            const float value = 3.0f * queries.row(0)[c] + apart[c];
            table.set(1999 - 9 * i, c, value * (1.0f + 1e-7f * uniform(random)));
        }
    const Database database(table, {prefix, coded}, split(table.n), table.n,
                            *tested_kernels().front(), 1);
    for (Metric metric : EVERY_METRIC) {
        const Found right =
            brute_force(scores64(table, queries, metric), 7, table.n, all_rows(table.n), 10);
        for (const Kernels* kernels : tested_kernels()) {
            scenario = "bounds, " + std::to_string(close) + " rows alike, prefix " +
                       std::to_string(prefix) + (coded ? " coded, metric " : ", metric ") +
                       std::to_string(int(metric)) + ", " + kernels->name;
            Visits visits;
            check_found(find_exact(*kernels, database.rows, queries, metric, 10, 1, &visits),
                        right);
        }
    }
}

}  // namespace

void test_bounds() {
    if (RACES_ONLY) return;
    std::mt19937 random(6);
    for (int64_t close : {30, 200})
        for (int64_t prefix : {61, 20})
            for (bool coded : {false, true}) check_close(close, prefix, coded, random);
    std::vector<float> signs(WIDTH);
    for (float& x : signs) x = sign(random);
    std::vector<std::vector<float>> good;
    for (int64_t i = 0; i < GOOD; ++i) good.push_back(rounded_off(signs, 0.42f + 0.01f * float(i)));
    check("error of the rows' codes", good, signs, WIDTH, true, random);
    for (int64_t i = 0; i < GOOD; ++i) good[i] = flipped(signs, i);
    check("error of the query's codes", good, rounded_off(signs, 0.48f), WIDTH, true, random);
    // Rows whose prefixes say nothing, and whose tails are parallel to the query's.
    std::vector<float> query(WIDTH, 0.25f);
    for (int64_t c = 8; c < WIDTH; ++c) query[c] = uniform(random);
    for (int64_t i = 0; i < GOOD; ++i)
        for (int64_t c = 0; c < WIDTH; ++c)
            good[i][c] =
                c < 8 ? (c % 2 ? 0.02f : -0.02f) * float(i) : query[c] * (1.0f + 0.01f * float(i));
    for (bool coded : {false, true}) check("tails", good, query, 8, coded, random);
}
