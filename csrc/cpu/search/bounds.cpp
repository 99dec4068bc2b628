#include "cpu/search/bounds.h"

#include <algorithm>

#include "cpu/search/read_ahead.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

// An fp32 threshold just below x, a score by so many columns; NaN, which drops no row, where that
// is beyond fp32.
float below(double x, int64_t dim) {
    const float least = std::nextafter(float(x - underflow(dim)), -INFINITY);
    return std::isinf(least) ? NAN : least;
}

double distance64(const float* x, const float* y, int64_t cols) {
    double sum = 0.0;
    for (int64_t c = 0; c < cols; ++c) sum += (double(x[c]) - y[c]) * (double(x[c]) - y[c]);
    return sum;
}

}  // namespace

Problem::Problem(const Kernels& kernels_, const Rows& rows_, const Queries& queries, Metric metric_,
                 int64_t dim_, int64_t k_)
    : kernels(kernels_),
      rows(rows_),
      metric(metric_),
      terms(terms_of(metric_)),
      dim(dim_),
      k(k_),
      margin(rounding(dim_) + (laddered() && rows_.ladder.signs ? ROTATION_ROUNDING : 0.0)),
      theta(queries.n),
      touched(queries.n) {
    if (is_whole()) levels = rows.levels;
    if (!levels.empty()) stops.assign(levels.begin() + 1, levels.end());
    stops.push_back(dim);
    const float* centre = laddered() ? rows.ladder.centre : nullptr;
    const double centre_square = centre ? kernels.dot64(centre, centre, dim) : 0.0;
    centre_norm = std::sqrt(centre_square);
    std::vector<float> less(dim);
    for (int64_t q = 0; q < queries.n; ++q) {
        const float* query = queries.data + q * queries.stride;
        centred(query, centre, prefix(), less.data());
        data.push_back(query);
        norm.push_back(std::sqrt(kernels.dot64(query, query, dim)));
        head.push_back(std::sqrt(kernels.dot64(less.data(), less.data(), prefix())));
        if (laddered()) rotate(rows.ladder, dim, less.data());
        theta[q] = -INFINITY;
        touched[q] = 0;
        for (int64_t level : levels)
            tails.push_back(std::sqrt(kernels.dot64(query + level, query + level, dim - level)));
        if (coded()) codes.push_back(code_query(kernels, source(), less.data(), prefix()));
        base.push_back(centre ? kernels.dot64(query, centre, dim) - centre_square : 0.0);
    }
}

float Problem::threshold(int64_t q, double theta) const {
    // The part of a score that depends on the query alone moves to the threshold. Where norms
    // divide, it depends on the row's norm too, and the scan adds it to each row.
    if (terms.normalized) return below(theta, dim);
    if (terms.squares == 0.0f) return below(theta - terms.product * base[q], dim);
    const double size = laddered() ? head[q] : norm[q];
    return below(theta + terms.squares * size * size * (1.0 - SLACK), dim);
}

const float* Problem::columns(int64_t row, std::vector<float>* x) const {
    x->resize(dim + 1);
    columns_of(kernels, rows, row, dim, x->data());
    return x->data();
}

double Problem::score(int64_t q, int64_t row, std::vector<float>* x) const {
    const float* values = columns(row, x);
    if (terms.source == Source::DIFFERENCE)
        return score_of(q, distance64(data[q], values, dim), 0.0);
    const double square = terms.normalized ? kernels.dot64(values, values, dim) : 0.0;
    return score_of(q, kernels.dot64(data[q], values, dim), std::sqrt(square));
}

// The factors of one query for the terms that prepare() gives each row. Those are, in order: prefix
// norm, tail norm, code error, squared norm.
void Pass::factor(const Panel::Group& group, int64_t i) {
    const int64_t at = group.first + i, q = queries_[at];
    const double unit = p_.unit(q), room = p_.margin * p_.norm[q];
    float* factors = factors_.data() + group.first * TERMS + i;
    const double error = p_.coded() ? p_.codes[q].error : 0.0;
    scales_[at] = float(unit * (p_.coded() ? p_.codes[q].scale : 1.0));
    if (!ordinary(p_.norm[q] * p_.norm[q])) scales_[at] = NAN;
    factors[0 * group.size] = above(unit * (error + room));
    factors[1 * group.size] = above(unit * (room + p_.tail(q, 0)));
    factors[2 * group.size] = above(unit * (error + p_.head[q] + room));
    factors[3 * group.size] = -p_.terms.squares;
}

void Pass::prepare(Scan* scan) {
    const bool coded = p_.coded(), tails = !p_.levels.empty();
    const float *prefix = reader_.stat(PREFIX_NORM, terms_[0]),
                *tail = tails ? reader_.stat(TAIL_NORM, terms_[1]) : nullptr,
                *scale = reader_.stat(CODE_SCALE, row_scale_),
                *error = reader_.stat(CODE_ERROR, terms_[2]);
    for (int r = 0; r < scan->rows; ++r) {
        const float norm = prefix[r], rest = tails ? tail[r] : 0.0f,
                    square = norm * norm + rest * rest;
        float inverse = 1.0f;
        if (p_.terms.normalized) inverse = square > 0.0f ? 1.0f / std::sqrt(square) : 0.0f;
        row_scale_[r] = coded ? scale[r] * inverse : inverse;
        if (!ordinary(square) || (square == 0.0f && norm + rest > 0.0f)) row_scale_[r] = NAN;
        terms_[0][r] = norm * inverse;
        terms_[1][r] = rest * inverse;
        terms_[2][r] = coded ? error[r] * inverse : 0.0f;
        terms_[3][r] = square * float(1.0 - SLACK);
    }
    scan->row_scale = row_scale_;
    scan->terms = TERMS;
    for (int j = 0; j < TERMS; ++j) scan->term_values[j] = terms_[j];
}

void Pass::of_group(const Panel::Group& group, Scan* scan) const {
    scan->query_scale = scales_.data() + group.first;
    scan->term_factors = factors_.data() + group.first * TERMS;
}

bool Pass::run(int64_t begin, int64_t end, const Trial* trial) {
    for (size_t i = 0; i < queries_.size(); ++i) {
        topks_[i].count = 0;
        thetas_[i] = trial ? trial->theta[queries_[i]] : p_.theta[queries_[i]].load();
        thresholds_[i] = p_.threshold(queries_[i], thetas_[i]);
    }
    Scan scan = {};
    bool finite = true;
    for (int64_t tile = begin; tile < end; ++tile) {
        finite &= reader_.read(tile, &scan);
        p_.laddered() ? ladder_.prepare(reader_, &scan) : prepare(&scan);
        for (const Panel::Group& group : panel_.groups()) {
            panel_.put(group, &scan);
            p_.laddered() ? ladder_.of_group(group, &scan) : of_group(group, &scan);
            scan.topk = topks_.data() + group.first;
            scan.thresholds = thresholds_.data() + group.first;
            p_.kernels.scan[int(source_)][group.size - 1](scan);
        }
    }
    for (size_t i = 0; i < queries_.size(); ++i)
        if (topks_[i].count > 0 && !(trial && columns_read[i] > trial->budget))
            p_.laddered() ? finish_ladder(i, trial != nullptr) : finish(i, trial != nullptr);
    if (!on_disk_) on_disk_ = has_waited();
    return finite;
}

// Whether a row's bound by the columns before a level still reaches θ.
bool Pass::possible(size_t i, const Span& span, int64_t local, double sum, size_t level) const {
    const int64_t q = queries_[i];
    const double prefix = span.stats[PREFIX_NORM * span.stats_stride + local];
    const double tail = p_.levels.empty() ? 0.0 : span.stats[TAIL_NORM * span.stats_stride + local];
    const double rest = level < p_.levels.size()
                            ? span.stats[(TAIL_NORM + level) * span.stats_stride + local]
                            : 0.0;
    const double square = prefix * prefix + tail * tail, norm = std::sqrt(square);
    if (!ordinary(square) || !ordinary(p_.norm[q] * p_.norm[q])) return true;
    double bound = sum + p_.margin * p_.norm[q] * norm + p_.tail(q, level) * rest;
    if (p_.terms.normalized)
        bound = (norm > 0.0 ? bound * p_.unit(q) / norm : 0.0) + p_.terms.product * SLACK;
    else
        bound = p_.terms.product * bound -
                p_.terms.squares * (square + p_.norm[q] * p_.norm[q]) * (1.0 - SLACK);
    return !(bound < thetas_[i]);
}

// Takes the rows of a chunk that passed one query's scan through its later bounds, and scores those
// that remain in fp64.
void Pass::finish(size_t i, bool counting) {
    poll();
    const int64_t q = queries_[i];
    const TopK& kept = topks_[i];
    sums_.resize(kept.count);
    local_.resize(kept.count);
    spans_.resize(kept.count);
    squares_.resize(kept.count);
    pointers_.resize(kept.count);
    for (int64_t e = 0; e < kept.count; ++e) {
        const int64_t row = row_of(kept.entries[e].key);
        spans_[e] = &span_of(p_.rows, row);
        local_[e] = row - spans_[e]->first;
        sums_[e] = p_.coded() ? 0.0f : kept.entries[e].partial;
    }
    int64_t count = kept.count;
    int64_t from = p_.rows.packed_dim;
    if (!counting) p_.touched[q].fetch_add(count, std::memory_order_relaxed);
    for (size_t s = 0; s < p_.stops.size() && count > 0; from = p_.stops[s++]) {
        const int64_t cols = p_.stops[s] - from;
        for (int64_t e = 0; e < count; ++e)
            pointers_[e] = suffix_at(p_.rows, *spans_[e], local_[e], from);
        pointers_.resize(count);
        if (on_disk_) read_ahead(pointers_, cols * element_size(p_.rows.dtype));
        sum_listed(p_.kernels, Source::PRODUCT, p_.data[q] + from, p_.rows.dtype, cols, &pointers_,
                   sums_.data(), squares_.data());
        columns_read[i] += count * cols;
        int64_t left = 0;
        for (int64_t e = 0; e < count; ++e) {
            if (!possible(i, *spans_[e], local_[e], sums_[e], s + 1)) continue;
            sums_[left] = sums_[e];
            local_[left] = local_[e];
            spans_[left++] = spans_[e];
        }
        count = left;
    }
    columns_read[i] += 2 * count * p_.dim;  // in fp64
    if (counting) return;
    for (int64_t e = 0; e < count; ++e) {
        const int64_t row = spans_[e]->first + local_[e];
        keep(i, {p_.score(q, row, &vector_), row});
    }
}

// Takes the rows that four bits leave through the bound of eight, and scores those that remain in
// fp64, the most promising first; later, many at once, where the last were read from disk.
void Pass::finish_ladder(size_t i, bool counting) {
    constexpr int64_t BYTE_COLUMNS = 8, CALL_COLUMNS = 16;  // what a row's last four bits cost
    constexpr size_t LATE = 64;  // rows: enough for a disk to answer side by side
    poll();
    const int64_t q = queries_[i];
    const TopK& kept = topks_[i];
    const double theta = counting ? thetas_[i] : p_.theta[q].load();
    ladder_.bound(i, kept.entries, kept.count, double(p_.threshold(q, theta)), &possible_);
    const int64_t count = possible_.size();
    columns_read[i] += kept.count * (low_bytes(p_.dim) / BYTE_COLUMNS + CALL_COLUMNS) +
                       count * 3 * p_.dim;  // in fp64
    if (counting) return;
    late_[i].insert(late_[i].end(), possible_.begin(), possible_.end());
    if (late_[i].size() >= (on_disk_ ? LATE : 1)) score_late(i);
}

void Pass::score_late(size_t i) {
    std::vector<Final>& rows = late_[i];
    const int64_t q = queries_[i];
    std::sort(rows.begin(), rows.end());
    if (on_disk_)
        read_ahead(p_.rows, rows.size(), 0, p_.dim, [&](int64_t e) { return rows[e].row; });
    for (const Final& each : rows) {
        if (each.score < double(p_.threshold(q, p_.theta[q].load()))) break;
        p_.touched[q].fetch_add(1, std::memory_order_relaxed);
        keep(i, {p_.score(q, each.row, &vector_), each.row});
    }
    rows.clear();
}

void Pass::score_late() {
    for (size_t i = 0; i < queries_.size(); ++i) score_late(i);
}

void Pass::keep(size_t i, const Final& final) {
    std::vector<Final>& heap = heaps[i];
    if (int64_t(heap.size()) < p_.k) {
        heap.push_back(final);
        if (int64_t(heap.size()) < p_.k) return;
        std::make_heap(heap.begin(), heap.end());
    } else if (final < heap.front()) {
        std::pop_heap(heap.begin(), heap.end());
        heap.back() = final;
        std::push_heap(heap.begin(), heap.end());
    }
    raise(p_.theta[queries_[i]], heap.front().score);
}

}  // namespace mrl
