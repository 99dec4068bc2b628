// Certified exact search, and what it has to find: rows ranked by plain fp64 scores.
#pragma once

#include "vectors.h"

UNWATCHED inline double score64(const float* query, const float* row, int64_t dim, Metric metric) {
    double dot = 0.0, square = 0.0, qq = 0.0, xx = 0.0;
    for (int64_t c = 0; c < dim; ++c) {
        const double q = query[c], x = row[c];
        dot += q * x;
        square += (q - x) * (q - x);
        qq += q * q;
        xx += x * x;
    }
    const MetricTerms& terms = terms_of(metric);
    if (terms.source == Source::DIFFERENCE) return -terms.squares * square;
    const double norms = terms.normalized ? std::sqrt(qq) * std::sqrt(xx) : 1.0;
    return norms > 0.0 ? terms.product * dot / norms : 0.0;
}

// [queries, n]
inline std::vector<double> scores64(const Table& table, const QueryRows& queries, Metric metric) {
    std::vector<double> scores;
    for (int64_t q = 0; q < queries.queries.n; ++q)
        for (int64_t row = 0; row < table.n; ++row)
            scores.push_back(score64(queries.row(q), table.row(row), table.width, metric));
    return scores;
}

// The k best of some of the n rows for each query.
inline Found brute_force(const std::vector<double>& scores, int64_t queries, int64_t n,
                         const std::vector<int64_t>& among, int64_t k) {
    Found found = none(queries, k);
    for (int64_t q = 0; q < queries; ++q) {
        std::vector<int64_t> rows = among;
        const double* mine = scores.data() + q * n;
        keep_best(&rows, k, [&](int64_t row) { return mine[row]; });
        for (size_t i = 0; i < rows.size(); ++i) {
            found.ids[q * k + i] = rows[i];
            found.scores[q * k + i] = float(mine[rows[i]]);
        }
    }
    return found;
}

inline void check_found(const Found& found, const Found& right) {
    CHECK_EQUAL(found.ids.size(), right.ids.size());
    for (size_t i = 0; i < right.ids.size(); ++i) {
        CHECK_EQUAL(found.ids[i], right.ids[i]);
        CHECK_NEAR(found.scores[i], right.scores[i], 2 * ROUNDING * std::abs(right.scores[i]));
    }
}

struct Visits {
    int64_t pruned = 0, full = 0;  // queries that read some, or all, of the rows
};

inline Found find_exact(const Kernels& kernels, const Rows& rows, const QueryRows& queries,
                        Metric metric, int64_t k, int threads, Visits* visits) {
    const int64_t count = queries.queries.n;
    Found found = room_for(count, k);
    std::vector<int64_t> touched(count, -7);
    CHECK(exact_search({kernels, threads}, rows, queries.queries, metric, {queries.width, k},
                       {found.scores.data(), found.ids.data()}, touched.data()) == Status::OK);
    for (int64_t some : touched) {
        CHECK(some >= 0 && some <= rows.eligible());
        ++(some < rows.eligible() ? visits->pruned : visits->full);
    }
    return found;
}

// Every row whose score, rounded, is at least a threshold, best first: for each query.
using InRange = std::vector<std::vector<int64_t>>;
inline InRange rows_in_range(const std::vector<double>& scores, int64_t queries, int64_t n,
                             const std::vector<int64_t>& among, double threshold) {
    InRange found(queries);
    for (int64_t q = 0; q < queries; ++q) {
        const double* mine = scores.data() + q * n;
        for (int64_t row : among)
            if (float(mine[row]) >= threshold) found[q].push_back(row);
        keep_best(&found[q], n, [&](int64_t row) { return mine[row]; });
    }
    return found;
}

inline void check_range(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                        int64_t dim, double threshold, const std::vector<double>& scores,
                        const InRange& right) {
    std::vector<std::vector<Neighbour>> found(1);
    CHECK(range_search(run, rows, queries, metric, dim, threshold, &found) == Status::OK);
    CHECK_EQUAL(found.size(), right.size());
    for (size_t q = 0; q < right.size(); ++q) {
        CHECK_EQUAL(found[q].size(), right[q].size());
        for (size_t i = 0; i < right[q].size(); ++i) {
            const double score = scores[q * rows.count() + right[q][i]];
            CHECK_EQUAL(found[q][i].id, right[q][i]);
            CHECK(found[q][i].score >= threshold);
            CHECK_NEAR(found[q][i].score, score, 2 * ROUNDING * std::abs(score) + 1e-45);
        }
    }
}
