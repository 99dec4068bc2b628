// A problem of nested scores: its fp64 scores, as a loss reads them, and the arguments for csrc.
#pragma once

#include "cpu/training/nested.h"
#include "vectors.h"

// The arguments of a call besides x, w and dims.
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

inline std::vector<float> uniforms(int64_t n, float scale, std::mt19937& random) {
    std::vector<float> out(n);
    for (float& x : out) x = scale * uniform(random);
    return out;
}

// n expected numbers and their error budgets. A number that is not set must stay UNSET.
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
        // Up to 12 pieces are added to a number.
        CHECK_NEAR(actual[i], exact, budget ? budget + 12 * ROUNDING * std::abs(exact) : 0.0);
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

    // The arguments for columns [begin, end).
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
                const float *a = x(r), *b = w(c);
                double sum = 0.0, size = 0.0;
                int64_t k = 0;
                for (int64_t g = 0; g < G; ++g) {
                    for (const int64_t dim = dims[g]; k < dim; ++k) {
                        const double product = double(a[k]) * b[k];
                        sum += product;
                        size += std::abs(product);
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

// The log-sum of y along a row or a column, and its error budget: that of y, the rounding of
// differences and of a sum of n terms.
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

const Shape SHAPES[] = {
    {1, 1, {3}}, {50, 65, {8, 16, 100}}, {97, 64, {5}}, {103, 130, {3, 64, 65, 70}}};
const Shape LARGE = {310, 400, {20, 150}};  // worth two threads, and two segments of rows

// Calls check(problem, its name) for every problem.
template <class Check>
void each_problem(std::mt19937& random, const Check& check) {
    for (const Options& options : OPTIONS) {
        std::vector<Shape> shapes;
        if (!RACES_ONLY) shapes.assign(std::begin(SHAPES), std::end(SHAPES));
        if (options.columns && (!RACES_ONLY || options.labels)) shapes.push_back(LARGE);
        for (const Shape& shape : shapes) {
            const std::string name = std::string(options.name) + ", " + std::to_string(shape.rows) +
                                     " x " + std::to_string(shape.cols);
            check(Problem(shape, options, random), name);
        }
    }
}
