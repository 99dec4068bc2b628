// Statistics of nested scores against fp64, with an error budget for every number.
#include "training/nested_problem.h"

namespace {

struct Folded {
    explicit Folded(const Problem& p)
        : row_max(p.G * p.rows, -INFINITY),
          hit(p.o.target ? p.G * p.rows : 0, NAN),
          col_max(p.o.columns ? p.col_array() : 0, NAN),
          row_sum(p.G * p.rows),
          soft_sum(p.o.soft ? p.G * p.rows : 0),
          col_sum(col_max.size(), NAN),
          labels(p.o.labels ? p.G * p.rows : 0) {}
    std::vector<float> row_max, hit, col_max;
    std::vector<double> row_sum, soft_sum, col_sum;
    std::vector<int64_t> labels;
    bool operator==(const Folded& other) const {
        const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
            return a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(double));
        };
        return same_bits(row_max, other.row_max) && same_bits(hit, other.hit) &&
               same_bits(col_max, other.col_max) && same(row_sum, other.row_sum) &&
               same(soft_sum, other.soft_sum) && same(col_sum, other.col_sum) &&
               labels == other.labels;
    }
};

// Folds chunks of columns, which end at `cuts`.
Folded fold_chunks(const Problem& p, const Kernels& kernels, const std::vector<int64_t>& cuts,
                   int threads) {
    Folded out(p);
    int64_t begin = 0;
    const auto at = [](auto& array) { return array.empty() ? nullptr : array.data(); };
    for (int64_t end : cuts) {
        fold({kernels, threads}, p.chunk(begin, end),
             {out.row_max.data(), out.row_sum.data(), at(out.labels), at(out.soft_sum), at(out.hit),
              p.o.columns ? out.col_max.data() + begin : nullptr,
              p.o.columns ? out.col_sum.data() + begin : nullptr});
        begin = end;
    }
    return out;
}

double softplus(double y) { return std::max(y, 0.0) + std::log1p(std::exp(-std::abs(y))); }

void check_row(const Problem& p, const Folded& found, int64_t g, int64_t r) {
    const int64_t out = g * p.rows + r, first = p.at(g, r, 0);
    const LogSum row(p.cols, p.y, p.y_budget, [&](int64_t c) { return first + c; });
    double sum = 0.0, off = 0.0, soft_sum = 0.0, weight = 0.0;
    bool has_hit = false;
    for (int64_t c = 0; c < p.cols; ++c) {
        const double y = p.y[first + c];
        if (p.hit(r, c)) {
            CHECK_NEAR(found.hit[out], y, p.y_budget[first + c]);
            has_hit = true;
        } else {
            sum += softplus(y);
            off += p.y_budget[first + c];
        }
        if (p.o.soft && p.soft(r, c) != 0.0) {
            soft_sum += p.soft(r, c) * y;
            weight += std::abs(p.soft(r, c));
        }
    }
    if (p.o.target && !has_hit) CHECK(std::isnan(found.hit[out]));
    if (p.o.sigmoid) {
        CHECK_NEAR(found.row_sum[out], sum, off + sum * double(p.cols + 16) * ROUNDING);
        return;
    }
    CHECK_NEAR(found.row_max[out], row.max, row.budget);
    CHECK_NEAR(found.row_max[out] + std::log(found.row_sum[out]), row.log(), row.budget);
    if (p.o.labels && row.sum > 0.0)
        CHECK_NEAR(p.y[first + found.labels[out]], row.max, 2.0 * row.budget);
    if (p.o.soft)
        CHECK_NEAR(found.soft_sum[out], soft_sum,
                   weight * (row.budget + 80.0 * ROUNDING * (row.range + 1.0)));
}

void check_fold(const Problem& p, const std::vector<const Kernels*>& all) {
    const std::string name = scenario;
    for (const Kernels* kernels : all) {
        scenario = name + ", " + kernels->name + ", fold";
        const Folded found = fold_chunks(p, *kernels, {p.cols}, 1);
        for (int64_t g = 0; g < p.G; ++g) {
            for (int64_t r = 0; r < p.rows; ++r) check_row(p, found, g, r);
            for (int64_t c = 0; p.o.columns && c < p.cols; ++c) {
                const LogSum column(p.rows, p.y, p.y_budget,
                                    [&](int64_t r) { return p.at(g, r, c); });
                const int64_t out = g * p.cols_apart + c;
                CHECK_NEAR(found.col_max[out], column.max, column.budget);
                CHECK_NEAR(found.col_max[out] + std::log(found.col_sum[out]), column.log(),
                           column.budget);
            }
        }
        for (int threads : THREADS) CHECK(fold_chunks(p, *kernels, {p.cols}, threads) == found);
        if (p.cols == 1) continue;
        const Folded parts = fold_chunks(p, *kernels, {p.cols / 3 + 1, p.cols}, 2);
        for (int64_t g = 0; g < p.G; ++g)
            for (int64_t r = 0; r < p.rows; ++r) check_row(p, parts, g, r);
        CHECK(parts.labels == found.labels);
    }
}

void check_store_scores(const Problem& p, const std::vector<const Kernels*>& all) {
    const int64_t stride = p.cols + 3, apart = p.rows * stride + 4;
    Numbers expected((p.G - 1) * apart + (p.rows - 1) * stride + p.cols);
    for (int64_t g = 0; g < p.G; ++g)
        for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t c = 0; c < p.cols; ++c) {
                const int64_t i = p.at(g, r, c);
                const double sum = p.s[i] + p.bias(c);
                expected.set(g * apart + r * stride + c, sum,
                             p.s_budget[i] + std::abs(sum) * ROUNDING);
            }
    for (const Kernels* kernels : all) {
        std::vector<float> first;
        for (int threads : THREADS) {
            std::vector<float> out(expected.value.size(), Numbers::UNSET);
            store_scores({*kernels, threads}, p.chunk(0, p.cols), out.data(), apart, stride);
            if (first.empty()) check_numbers(first = out, expected);
            CHECK(same_bits(out, first));
        }
    }
}

// Small integers: scores are exact and many are equal; the first of the largest is the label.
void check_labels(const Kernels& kernels, std::mt19937& random) {
    const int64_t rows = 60, cols = 200, depth = 5;
    std::vector<float> x(rows * depth), w(cols * depth), row_max(rows, -INFINITY);
    for (float& value : x) value = float(random() % 3) - 1.0f;
    for (float& value : w) value = float(random() % 3) - 1.0f;
    std::vector<double> row_sum(rows);
    std::vector<int64_t> labels(rows, -1);
    for (int64_t begin = 0, end = 70; begin < cols; begin = end, end = cols) {
        Scores s = {};
        s.x = {x.data(), depth};
        s.w = {w.data() + begin * depth, depth};
        s.rows = rows;
        s.cols = end - begin;
        s.dims = {depth};
        s.first_col = begin;
        s.period = 1;
        s.own_boost = s.other_boost = 1.0f;
        fold({kernels, 1}, s,
             {row_max.data(), row_sum.data(), labels.data(), nullptr, nullptr, nullptr, nullptr});
    }
    for (int64_t r = 0; r < rows; ++r) {
        float best = -INFINITY;
        int64_t label = -1;
        for (int64_t c = 0; c < cols; ++c) {
            float y = 0.0f;
            for (int64_t k = 0; k < depth; ++k) y += x[r * depth + k] * w[c * depth + k];
            if (y > best) best = y, label = c;
        }
        CHECK_EQUAL(row_max[r], best);
        CHECK_EQUAL(labels[r], label);
    }
}

}  // namespace

void test_fold() {
    std::mt19937 random(5);
    const std::vector<const Kernels*> all = tested_kernels();
    each_problem(random, [&](const Problem& p, const std::string& name) {
        scenario = "fold, " + name;
        check_fold(p, all);
        scenario = "scores, " + name;
        if (!p.o.scales && !p.o.mask) check_store_scores(p, all);
    });
    for (const Kernels* kernels : all) {
        if (RACES_ONLY) break;
        scenario = std::string("labels, ") + kernels->name;
        check_labels(*kernels, random);
    }
}
