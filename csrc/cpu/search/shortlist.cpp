#include "cpu/search/shortlist.h"

#include <algorithm>
#include <utility>

#include "cpu/search/read_ahead.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t PROBE_STEP = 16;  // every 16th tile tells whether rows score alike

// The norm of a row's columns that are searched, or less, where the statistics are of others;
// infinite where it is 0. `room` is for its columns.
double least_norm(const Problem& p, const Span& span, int64_t row, std::vector<float>* room) {
    const auto stat = [&](int64_t which) { return span.stats[which * span.stats_stride + row]; };
    const std::vector<int64_t>& dims = p.rows.ladder.dims;
    const int64_t inverse = SIGN_FACTOR + 2 * dims.size() + p.rows.ladder.place(p.dim);
    const double known = 0.99 * (dims.empty() ? stat(PREFIX_NORM) : 1.0 / stat(inverse));
    if (known * known > SMALLEST) return known;
    const float* x = p.columns(span.first + row, room);
    const double norm = std::sqrt(p.kernels.dot64(x, x, p.dim));
    return norm > 0.0 ? norm : INFINITY;
}

// The least norm of a row that is not 0, and the greatest; or what bounds these.
std::pair<double, double> norms(const Problem& p, const Rows& rows) {
    // Of columns without statistics, only cosines ask for the least.
    const bool known = p.is_described() || !p.terms.normalized,
               tails = !(p.is_described() ? p.levels : rows.levels).empty();
    double shortest = INFINITY;
    Range range;
    std::vector<float> room;
    auto see = [&](const Span& span, int64_t row, int64_t count) {  // within a factor √2
        const float *norms = span.stats + PREFIX_NORM * span.stats_stride + row,
                    *rest = span.stats + TAIL_NORM * span.stats_stride + row;
        range.add(norms, tails ? rest : nullptr, count);
        for (int64_t i = row; !known && i < row + count; ++i)
            if (norms[i - row] + (tails ? rest[i - row] : 0.0f) > 0.0f)
                shortest = std::min(shortest, least_norm(p, span, i, &room));
    };
    if (rows.gathered_rows.empty())
        for (const Span& span : rows.spans) see(span, 0, span.rows);
    for (int64_t row : rows.gathered_rows) {
        const Span& span = span_of(rows, row);
        see(span, row - span.first, 1);
    }
    return {known ? range.least * 0.7 : shortest, range.greatest};
}

}  // namespace

int64_t first_length(const Problem& p) { return std::min(p.k + p.k / 8 + 4, p.rows.eligible()); }
int64_t last_length(const Problem& p) { return std::min(2 * p.k + 128, p.rows.eligible()); }

Shortlist shortlist_by_scores(const Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                              int64_t keep, int64_t step, int threads) {
    Shortlist list(p, which, keep);
    const auto [least, greatest] = norms(p, rows);
    // Squares must stay within fp32.
    const bool inside =
        greatest * greatest < LARGEST && (least * least > SMALLEST || least > greatest);
    const bool differences = p.terms.source == Source::DIFFERENCE;
    const double product = p.terms.product;
    if (differences) list.relative = 4.0 * p.margin;
    for (size_t i = 0; i < which.size(); ++i) {
        const double norm = p.norm[which[i]];
        if (!inside || !ordinary(norm * norm)) continue;
        list.base[i] = 0.0;
        list.absolute[i] = underflow(p.dim);
        if (!differences)
            list.absolute[i] += product * p.margin * (p.terms.normalized ? 3.0 : norm * greatest);
    }
    list.status = scan_all({p.kernels, threads}, rows, list.data.queries,
                           {p.metric, p.terms.source, p.dim, keep, step}, list.entries.get(),
                           list.counts.data());
    return list;
}

Status sees_alike(const Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                  MakeShortlist make, int threads, bool* alike) {
    const std::vector<int64_t> some(which.begin(),
                                    which.begin() + std::min<size_t>(which.size(), MAX_GROUP));
    const int64_t kth = p.k / PROBE_STEP, last = last_length(p) / PROBE_STEP + 8;
    *alike = false;
    if (rows.eligible() < 2 * PROBE_STEP * (last + TILE)) return Status::OK;
    const Shortlist list = make(p, rows, some, last + 1, PROBE_STEP, threads);
    if (list.status == Status::OVERFLOW_) return Status::OK;
    if (list.status != Status::OK) return list.status;
    size_t close = 0;
    for (size_t i = 0; i < some.size(); ++i) {
        if (list.counts[i] <= last || !list.holds(i)) continue;
        const double high = list.score(i, kth), low = list.score(i, last);
        close += low + list.error(i, low) >= high - list.error(i, high);
    }
    *alike = 2 * close > some.size();
    return Status::OK;
}

Status scan_narrow(Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                   MakeShortlist make, int64_t keep, int threads, std::vector<int64_t>* undecided,
                   std::vector<std::vector<Final>>* best) {
    if (which.empty()) return Status::OK;
    const int64_t n = which.size(), count = p.rows.eligible();
    const Shortlist list = make(p, rows, which, keep, 1, threads);
    if (list.status == Status::OVERFLOW_) {  // of fp32 sums; fp64 holds them
        undecided->insert(undecided->end(), which.begin(), which.end());
        return Status::OK;
    }
    if (list.status != Status::OK) return list.status;
    std::vector<char> open(n, 0);
    each(n, threads, [&](int64_t i) {
        const int64_t q = which[i];
        const double kth = list.score(i, p.k - 1), last = list.score(i, list.keep - 1);
        const double least = kth - list.error(i, kth);
        p.touched[q] = count;
        open[i] = list.keep < count && !(list.holds(i) && last + list.error(i, last) < least);
        if (open[i]) {
            if (list.holds(i)) raise(p.theta[q], list.base[i] + least);
            return;
        }
        std::vector<float> room;
        (*best)[q].reserve(list.keep);
        read_ahead(p.rows, list.keep, p.rows.packed_dim, p.dim,
                   [&](int64_t e) { return row_of(list.of(i)[e].key); });
        for (const Entry* entry = list.of(i); entry < list.of(i) + list.keep; ++entry) {
            const double score = score_of(entry->key);
            if (score + list.error(i, score) < least) break;
            const int64_t row = row_of(entry->key);
            (*best)[q].push_back({p.score(q, row, &room), row});
        }
    });
    for (int64_t i = 0; i < n; ++i)
        if (open[i]) undecided->push_back(which[i]);
    return Status::OK;
}

}  // namespace mrl
