// Statistics and gradients of nested scores against fp64, with an error budget for every number.
#include <functional>

#include "cpu/nested.h"
#include "vectors.h"

namespace {

// What a call is given besides x, w and dims.
struct Options {
    const char* name;
    bool bias, scales, target;
    int64_t period;  // 0 is the number of columns
    bool exclude_own;
    float own_boost, other_boost;
    enum { NONE, SHARED, EACH } soft;
    bool mask, sigmoid, labels, columns;
};

const Options OPTIONS[] = {
    {"plain", false, false, false, 0, false, 1, 1, Options::NONE, false, false, true, false},
    {"classes", true, false, true, 0, false, 1, 1, Options::SHARED, false, false, true, false},
    {"retrieval", false, true, true, 17, false, 1.5f, 1, Options::NONE, true, false, false, true},
    {"negatives", false, true, true, 17, false, 1, 1.25f, Options::NONE, false, false, false, true},
    {"queries", false, true, true, 0, true, 1, 1, Options::NONE, false, false, false, false},
    {"teacher", true, true, true, 0, false, 1, 1, Options::EACH, true, false, true, true},
    {"pairs", true, true, true, 0, false, 1, 1, Options::NONE, false, true, false, false},
};

struct Shape {
    int64_t rows, cols;
    std::vector<int64_t> dims;
};

std::vector<float> uniforms(int64_t n, float scale, std::mt19937& random) {
    std::vector<float> out(n);
    for (float& x : out) x = scale * uniform(random);
    return out;
}

// n numbers and how far off fp32 may be; what is not set stays as it was.
struct Numbers {
    explicit Numbers(int64_t n) : value(n, UNSET), budget(n, 0.0) {}
    static constexpr float UNSET = 0.25f;
    void add(int64_t at, double x, double off) {
        value[at] += x;
        budget[at] += off;
    }
    void set(int64_t at, double x, double off) {
        value[at] = x;
        budget[at] = off;
    }
    std::vector<double> value, budget;
};

template <class T>
void check_numbers(const std::vector<T>& actual, const Numbers& expected) {
    CHECK_EQUAL(actual.size(), expected.value.size());
    for (size_t i = 0; i < actual.size(); ++i) {
        const double exact = expected.value[i], budget = expected.budget[i];
        CHECK_NEAR(actual[i], exact, budget ? budget + 4 * ROUNDING * std::abs(exact) : 0.0);
    }
}

class Problem {
  public:
    Problem(const Shape& shape, const Options& options, std::mt19937& random)
        : o(options),
          rows(shape.rows),
          cols(shape.cols),
          G(int64_t(shape.dims.size())),
          depth(shape.dims.back()),
          dims(shape.dims),
          cols_apart(cols + 2),
          x_(uniforms(rows * depth, 1.0f, random)),
          w_(uniforms(cols * depth, 1.0f, random)),
          x_rows_(x_.data(), rows, depth, 0, depth, depth + 3, DType::F32),
          w_rows_(w_.data(), cols, depth, 0, depth, depth + 2, DType::F32),
          bias_(uniforms(o.bias ? cols : 0, 1.0f, random)),
          row_scale_(uniforms(o.scales ? G * rows : 0, 2.0f, random)),
          col_scale_(uniforms(o.scales ? col_array() : 0, 1.0f, random)) {
        if (o.target)
            for (int64_t r = 0; r < rows; ++r)  // some are no column
                target_.push_back(r % 7 == 6 ? (r % 2 ? -1 : cols + 3) : int64_t(random() % cols));
        if (o.mask) {
            mask_.resize((rows - 1) * (cols + 5) + cols);
            for (uint8_t& masked : mask_) masked = random() % 4 == 0 ? 1 + random() % 255 : 0;
            std::fill_n(mask_.begin(), cols, 1);                           // a whole row
            for (int64_t r = 0; r < rows; ++r) mask_[r * (cols + 5)] = 1;  // and column
        }
        if (o.soft == Options::SHARED) soft_ = uniforms(cols, 1.0f, random);
        if (o.soft == Options::EACH) soft_ = uniforms((rows - 1) * (cols + 1) + cols, 1.0f, random);
        for (int64_t r = 0; o.soft == Options::EACH && o.mask && r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c)
                if (masked(r, c)) soft_[r * (cols + 1) + c] = 0.0f;
        for (int64_t r = 0; r < (o.soft == Options::EACH ? rows : 1); ++r) {
            double total = 0.0;
            for (int64_t c = 0; o.soft && c < cols; ++c) total += soft(r, c);
            soft_total_.push_back(float(total));
        }
        make_scores();
    }

    // Columns [begin, end).
    Scores chunk(int64_t begin, int64_t end) const {
        const auto at = [&](const auto& array) { return array.empty() ? nullptr : array.data(); };
        const auto from = [&](const auto& array) {
            return array.empty() ? nullptr : array.data() + begin;
        };
        Scores s = {};
        s.x = {static_cast<const float*>(x_rows_.row(0)), x_rows_.stride};
        s.w = {static_cast<const float*>(w_rows_.row(begin)), w_rows_.stride};
        s.rows = rows;
        s.cols = end - begin;
        s.dims = dims;
        s.bias = from(bias_);
        s.row_scale = at(row_scale_);
        s.col_scale = from(col_scale_);
        s.cols_apart = cols_apart;
        s.target = at(target_);
        s.first_col = begin;
        s.period = period();
        s.exclude_own = o.exclude_own;
        s.own_boost = o.own_boost;
        s.other_boost = o.other_boost;
        s.soft = from(soft_);
        s.soft_stride = o.soft == Options::EACH ? cols + 1 : 0;
        s.mask = from(mask_);
        s.mask_stride = cols + 5;
        s.sigmoid = o.sigmoid;
        return s;
    }

    int64_t period() const { return o.period ? o.period : cols; }
    int64_t col_array() const { return (G - 1) * cols_apart + cols; }
    bool masked(int64_t r, int64_t c) const { return o.mask && mask_[r * (cols + 5) + c]; }
    bool own(int64_t r, int64_t c) const { return o.target && (c - target_[r]) % period() == 0; }
    bool hit(int64_t r, int64_t c) const { return o.target && target_[r] == c; }
    double soft(int64_t r, int64_t c) const {
        return soft_[o.soft == Options::EACH ? r * (cols + 1) + c : c];
    }
    double row_scale(int64_t g, int64_t r) const { return o.scales ? row_scale_[g * rows + r] : 1; }
    double col_scale(int64_t g, int64_t c) const {
        return o.scales ? col_scale_[g * cols_apart + c] : 1;
    }
    int64_t at(int64_t g, int64_t r, int64_t c) const { return (g * rows + r) * cols + c; }

    const Options o;
    const int64_t rows, cols, G, depth;
    const std::vector<int64_t> dims;
    const int64_t cols_apart;
    std::vector<double> s, s_budget, y, y_budget;  // [G, rows, cols]
    std::vector<float> soft_total_;

    const float* x(int64_t r) const { return x_.data() + r * depth; }
    const float* w(int64_t c) const { return w_.data() + c * depth; }
    double bias(int64_t c) const { return o.bias ? bias_[c] : 0; }

  private:
    UNWATCHED void make_scores() {
        for (std::vector<double>* all : {&s, &s_budget, &y, &y_budget})
            all->resize(G * rows * cols);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) {
                double sum = 0.0, size = 0.0;
                int64_t k = 0;
                for (int64_t g = 0; g < G; ++g) {
                    for (; k < dims[g]; ++k) {
                        sum += double(x(r)[k]) * w(c)[k];
                        size += std::abs(double(x(r)[k]) * w(c)[k]);
                    }
                    const int64_t i = at(g, r, c);
                    s[i] = sum;
                    s_budget[i] = size * double(dims[g] + 4) * ROUNDING;
                    const double scale = row_scale(g, r) * col_scale(g, c);
                    const double boost = !own(r, c) ? o.other_boost : hit(r, c) ? 1.0 : o.own_boost;
                    const double z = scale * sum + bias(c);
                    const bool out = masked(r, c) || (o.exclude_own && own(r, c));
                    y[i] = out ? -INFINITY : z * boost;
                    const double off = std::abs(scale) * s_budget[i] +
                                       4 * ROUNDING * (std::abs(scale * sum) + std::abs(bias(c)));
                    y_budget[i] = out ? 0.0 : std::abs(boost) * off;
                }
            }
    }

    std::vector<float> x_, w_;
    Elements x_rows_, w_rows_;
    std::vector<float> bias_, row_scale_, col_scale_, soft_;
    std::vector<int64_t> target_;
    std::vector<uint8_t> mask_;
};

// Of y along a row or a column: what its log-sum may be off by, from that of each y, the rounding
// of differences and of a sum of n terms.
struct LogSum {
    double max = -INFINITY, sum = 0.0, budget = 0.0;
    template <class At>
    LogSum(int64_t n, const std::vector<double>& y, const std::vector<double>& budgets,
           const At& at) {
        double least = INFINITY;
        for (int64_t i = 0; i < n; ++i) {
            max = std::max(max, y[at(i)]);
            budget = std::max(budget, budgets[at(i)]);
        }
        for (int64_t i = 0; i < n; ++i) {
            if (y[at(i)] == -INFINITY) continue;
            sum += std::exp(y[at(i)] - max);
            least = std::min(least, y[at(i)]);
        }
        if (sum > 0.0) range = max - least;
        budget += (range + double(n) + 16.0) * ROUNDING;
    }
    double range = 0.0;
    double log() const { return sum > 0.0 ? max + std::log(sum) : -INFINITY; }
};

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

// In chunks of columns, which end at `cuts`.
Folded fold_chunks(const Problem& p, const Kernels& kernels, const std::vector<int64_t>& cuts,
                   int threads) {
    Folded out(p);
    int64_t begin = 0;
    const auto at = [](auto& array) { return array.empty() ? nullptr : array.data(); };
    for (int64_t end : cuts) {
        fold(kernels, p.chunk(begin, end), threads, out.row_max.data(), out.row_sum.data(),
             at(out.labels), at(out.soft_sum), at(out.hit),
             p.o.columns ? out.col_max.data() + begin : nullptr,
             p.o.columns ? out.col_sum.data() + begin : nullptr);
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
            store_scores(*kernels, p.chunk(0, p.cols), threads, out.data(), apart, stride);
            if (first.empty()) check_numbers(first = out, expected);
            CHECK(same_bits(out, first));
        }
    }
}

// Numbers of a backward, the names those of Given.
struct Upstream {
    Upstream(const Problem& p, std::mt19937& random)
        : d_row(uniforms(p.G * p.rows, 1.0f, random)),
          d_hit(uniforms(p.o.target && !p.o.exclude_own ? p.G * p.rows : 0, 1.0f, random)),
          d_soft(uniforms(p.o.soft ? p.G * p.rows : 0, 1.0f, random)),
          d_col(uniforms(p.o.columns ? p.col_array() : 0, 1.0f, random)),
          row_max(p.G * p.rows),
          row_log(p.G * p.rows),
          col_max(d_col.size()),
          col_log(d_col.size()) {
        for (int64_t g = 0; g < p.G; ++g) {
            for (int64_t r = 0; r < p.rows; ++r) {
                const int64_t first = p.at(g, r, 0);
                set(LogSum(p.cols, p.y, p.y_budget, [&](int64_t c) { return first + c; }),
                    g * p.rows + r, &row_max, &row_log);
            }
            for (int64_t c = 0; p.o.columns && c < p.cols; ++c)
                set(LogSum(p.rows, p.y, p.y_budget, [&](int64_t r) { return p.at(g, r, c); }),
                    g * p.cols_apart + c, &col_max, &col_log);
        }
    }
    static void set(const LogSum& of, int64_t at, std::vector<float>* max,
                    std::vector<float>* log) {
        (*max)[at] = of.sum > 0.0 ? float(of.max) : 0.0f;
        (*log)[at] = of.sum > 0.0 ? float(std::log(of.sum)) : 0.0f;
    }
    Given given(const Problem& p, int64_t begin) const {
        const auto at = [](const auto& array) { return array.empty() ? nullptr : array.data(); };
        const auto from = [&](const auto& array) {
            return array.empty() ? nullptr : array.data() + begin;
        };
        return {row_max.data(),
                row_log.data(),
                d_row.data(),
                at(d_hit),
                at(d_soft),
                from(col_max),
                from(col_log),
                from(d_col),
                p.o.soft ? p.soft_total_.data() : nullptr,
                nullptr,
                0,
                0};
    }
    std::vector<float> d_row, d_hit, d_soft, d_col, row_max, row_log, col_max, col_log;
};

// Gradients of every input, flat as the engine writes them.
template <class Array>
struct Gradients {
    explicit Gradients(const Problem& p, const Array& none)
        : dx(make((p.rows - 1) * (p.depth + 1) + p.depth, none)),
          dw(make((p.cols - 1) * (p.depth + 4) + p.depth, none)),
          d_row_scale(make(p.o.scales ? p.G * p.rows : 0, none)),
          d_col_scale(make(p.o.scales ? p.col_array() : 0, none)),
          db(make(p.o.bias ? p.cols : 0, none)) {}
    static Numbers make(int64_t n, const Numbers&) { return Numbers(n); }
    static std::vector<float> make(int64_t n, const std::vector<float>&) {
        return std::vector<float>(n, Numbers::UNSET);
    }
    Array dx, dw, d_row_scale, d_col_scale, db;
};
using Found32 = Gradients<std::vector<float>>;
using Expected64 = Gradients<Numbers>;

// dL/dy of one score, and what it may be off by.
struct Slope {
    double value, budget;
};

Slope slope(const Problem& p, const Upstream& up, int64_t g, int64_t r, int64_t c) {
    const int64_t i = p.at(g, r, c), row = g * p.rows + r, column = g * p.cols_apart + c;
    const double y = p.y[i], off = p.y_budget[i] + 4 * ROUNDING;
    const double d_hit = up.d_hit.empty() ? 0.0 : up.d_hit[row];
    if (p.o.sigmoid) {
        const double d =
            p.hit(r, c) ? d_hit / (1.0 + std::exp(y)) : up.d_row[row] / (1.0 + std::exp(-y));
        return {d, std::abs(d) * (off + 12 * ROUNDING)};
    }
    const double d_soft = p.o.soft ? up.d_soft[row] : 0.0;
    const double total = p.o.soft ? p.soft_total_[p.o.soft == Options::EACH ? r : 0] : 0.0;
    const double scale = up.d_row[row] - d_hit - d_soft * total;
    const double size = std::abs(up.d_row[row]) + std::abs(d_hit) + std::abs(d_soft * total);
    const bool out = y == -INFINITY, is_hit = p.hit(r, c) && !out;
    const auto share = [&](double max, double log) { return out ? 0.0 : std::exp(y - max - log); };
    const auto loss = [&](double max, double log) {
        return out ? 0.0 : off + ROUNDING * (std::abs(y - max) + std::abs(log) + 12.0);
    };
    const double share_row = share(up.row_max[row], up.row_log[row]);
    double value = scale * share_row + (is_hit ? d_hit : 0.0);
    double budget = size * share_row * (loss(up.row_max[row], up.row_log[row]) + 4 * ROUNDING);
    if (p.o.soft) {
        value += d_soft * p.soft(r, c);
        budget += std::abs(d_soft * p.soft(r, c)) * 3 * ROUNDING;
    }
    if (p.o.columns) {
        const double d_col = up.d_col[column], max = up.col_max[column], log = up.col_log[column];
        value += d_col * share(max, log);
        budget += std::abs(d_col) * share(max, log) * loss(max, log);
        if (is_hit) budget += std::abs(d_col) * 6 * ROUNDING;
    }
    if (is_hit) budget += size * 8 * ROUNDING;
    return {value, budget + std::abs(value) * 4 * ROUNDING};
}

// `slopes` [G, rows, cols] of the scores as a loss reads them.
UNWATCHED Expected64 propagate(const Problem& p, const std::vector<Slope>& slopes) {
    Expected64 out(p, Numbers(0));
    const double steps = double(p.rows + p.cols + 16) * ROUNDING;  // of a sum
    for (int64_t g = 0; g < p.G; ++g)
        for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t c = 0; c < p.cols; ++c) {
                const Slope& d = slopes[p.at(g, r, c)];
                const double s = p.s[p.at(g, r, c)], off = p.s_budget[p.at(g, r, c)];
                const double scale = p.row_scale(g, r) * p.col_scale(g, c);
                const double room = d.budget + std::abs(d.value) * steps;
                for (int64_t k = 0; k < p.dims[g]; ++k) {
                    const double x = scale * p.x(r)[k], w = scale * p.w(c)[k];
                    out.dx.add(r * (p.depth + 1) + k, d.value * w, room * std::abs(w));
                    out.dw.add(c * (p.depth + 4) + k, d.value * x, room * std::abs(x));
                }
                if (p.o.bias) out.db.add(c, d.value, room);
                if (!p.o.scales) continue;
                const double sum_room = room * std::abs(s) + std::abs(d.value) * off;
                out.d_row_scale.add(g * p.rows + r, d.value * p.col_scale(g, c) * s,
                                    sum_room * std::abs(p.col_scale(g, c)));
                out.d_col_scale.add(g * p.cols_apart + c, d.value * p.row_scale(g, r) * s,
                                    sum_room * std::abs(p.row_scale(g, r)));
            }
    return out;
}

Found32 run_gradients(const Problem& p, const Kernels& kernels, const std::vector<int64_t>& cuts,
                      int64_t workspace, int threads, const std::function<Given(int64_t)>& given) {
    Found32 out(p, {});
    int64_t begin = 0;
    for (int64_t end : cuts) {
        gradients(kernels, p.chunk(begin, end), given(begin), threads, workspace, out.dx.data(),
                  p.depth + 1, out.dw.data() + begin * (p.depth + 4), p.depth + 4,
                  p.o.scales ? out.d_row_scale.data() : nullptr,
                  p.o.scales ? out.d_col_scale.data() + begin : nullptr,
                  p.o.bias ? out.db.data() + begin : nullptr);
        begin = end;
    }
    return out;
}

void check_gradients(const Problem& p, const std::vector<const Kernels*>& all,
                     const Expected64& expected, const std::function<Given(int64_t)>& given) {
    const std::string name = scenario;
    const auto check = [&](const Found32& found) {
        check_numbers(found.dx, expected.dx);
        check_numbers(found.dw, expected.dw);
        check_numbers(found.d_row_scale, expected.d_row_scale);
        check_numbers(found.d_col_scale, expected.d_col_scale);
        check_numbers(found.db, expected.db);
    };
    for (const Kernels* kernels : all) {
        scenario = name + ", " + kernels->name + ", gradients";
        const Found32 found = run_gradients(p, *kernels, {p.cols}, 1 << 20, 1, given);
        check(found);
        for (int threads : THREADS) {
            const Found32 other = run_gradients(p, *kernels, {p.cols}, 1 << 20, threads, given);
            CHECK(same_bits(other.dx, found.dx) && same_bits(other.dw, found.dw) &&
                  same_bits(other.d_row_scale, found.d_row_scale) &&
                  same_bits(other.d_col_scale, found.d_col_scale) && same_bits(other.db, found.db));
        }
        check(run_gradients(p, *kernels, {p.cols / 2 + 1, p.cols}, 1, 2, given));
    }
}

void check_loss(const Problem& p, const std::vector<const Kernels*>& all, std::mt19937& random) {
    const Upstream up(p, random);
    std::vector<Slope> slopes;
    for (int64_t g = 0; g < p.G; ++g)
        for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t c = 0; c < p.cols; ++c) slopes.push_back(slope(p, up, g, r, c));
    check_gradients(p, all, propagate(p, slopes),
                    [&](int64_t begin) { return up.given(p, begin); });
}

// Gradients of the scores themselves, as logits have them.
void check_given(const Problem& p, const std::vector<const Kernels*>& all, std::mt19937& random) {
    const int64_t stride = p.cols + 3, apart = p.rows * stride + 4;
    const std::vector<float> grad =
        uniforms((p.G - 1) * apart + (p.rows - 1) * stride + p.cols, 1.0f, random);
    std::vector<Slope> slopes;
    for (int64_t g = 0; g < p.G; ++g)
        for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t c = 0; c < p.cols; ++c)
                slopes.push_back({grad[g * apart + r * stride + c], 0.0});
    check_gradients(p, all, propagate(p, slopes), [&](int64_t begin) {
        Given given = {};
        given.grad = grad.data() + begin;
        given.grad_apart = apart;
        given.grad_stride = stride;
        return given;
    });
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
        fold(kernels, s, 1, row_max.data(), row_sum.data(), labels.data(), nullptr, nullptr,
             nullptr, nullptr);
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

void test_nested() {
    std::mt19937 random(5);
    const std::vector<const Kernels*> all = available_kernels();
    const Shape shapes[] = {
        {1, 1, {3}}, {50, 65, {8, 16, 100}}, {97, 64, {5}}, {103, 130, {3, 64, 65, 70}}};
    const Shape large = {310, 700, {20, 150}};  // worth four threads
    for (const Options& options : OPTIONS) {
        std::vector<Shape> mine(std::begin(shapes), std::end(shapes));
        if (options.columns) mine.push_back(large);
        for (const Shape& shape : mine) {
            scenario = std::string("nested, ") + options.name + ", " + std::to_string(shape.rows) +
                       " x " + std::to_string(shape.cols);
            const std::string name = scenario;
            const Problem p(shape, options, random);
            check_fold(p, all);
            scenario = name;
            check_loss(p, all, random);
            if (options.scales || options.mask) continue;
            scenario = name + ", logits";
            check_store_scores(p, all);
            check_given(p, all, random);
        }
    }
    for (const Kernels* kernels : all) {
        scenario = std::string("nested, labels, ") + kernels->name;
        check_labels(*kernels, random);
    }
}
