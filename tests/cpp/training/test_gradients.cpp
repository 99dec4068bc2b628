// Gradients of nested losses against fp64, with an error budget for every number.
#include <functional>

#include "training/nested_problem.h"

namespace {

// The inputs of a backward, named as in Given.
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

// Gradients of every input, flat as csrc writes them.
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

// The inputs' gradients, from `slopes` [G, rows, cols]: those of the scores as a loss reads them.
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
                const float *x = p.x(r), *w = p.w(c);
                double *dx = &out.dx.value[r * (p.depth + 1)],
                       *dw = &out.dw.value[c * (p.depth + 4)],
                       *dx_room = &out.dx.budget[r * (p.depth + 1)],
                       *dw_room = &out.dw.budget[c * (p.depth + 4)];
                const double slope = scale * d.value, slope_room = std::abs(scale) * room;
                for (int64_t k = 0, dim = p.dims[g]; k < dim; ++k) {
                    dx[k] += slope * w[k];
                    dw[k] += slope * x[k];
                    dx_room[k] += slope_room * std::abs(w[k]);
                    dw_room[k] += slope_room * std::abs(x[k]);
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
        gradients({kernels, threads}, p.chunk(begin, end), given(begin), workspace,
                  {out.dx.data(), p.depth + 1, out.dw.data() + begin * (p.depth + 4), p.depth + 4,
                   p.o.scales ? out.d_row_scale.data() : nullptr,
                   p.o.scales ? out.d_col_scale.data() + begin : nullptr,
                   p.o.bias ? out.db.data() + begin : nullptr});
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

// Gradients of the scores themselves are given, as for logits.
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

}  // namespace

void test_gradients() {
    std::mt19937 random(6);
    const std::vector<const Kernels*> all = tested_kernels();
    each_problem(random, [&](const Problem& p, const std::string& name) {
        scenario = "gradients, " + name;
        check_loss(p, all, random);
        scenario = "gradients of logits, " + name;
        if (!p.o.scales && !p.o.mask) check_given(p, all, random);
    });
}
