#include "cpu/search/ladder_bounds.h"

#include "cpu/search/bounds.h"

namespace mrl {

LadderBounds::LadderBounds(const Problem& problem, const std::vector<int64_t>& queries,
                           const Panel& panel)
    : p_(problem), queries_(queries), listed_(problem.kernels, problem.rows) {
    if (!p_.laddered()) return;
    const MetricTerms& terms = p_.terms;
    terms_ = !p_.rows.ladder.has_terms() ? 1 : terms.normalized ? 3 : 2;
    factors_.resize(terms_ * queries.size());
    bases_.resize(queries.size());
    for (const Panel::Group& group : panel.groups())
        for (int64_t i = 0; i < group.size; ++i) {
            const int64_t q = queries[group.first + i];
            const double unit = p_.unit(q), room = p_.margin * (p_.norm[q] + p_.centre_norm),
                         error = p_.codes[q].error;
            of_code_norm_.push_back(above(unit * error * (1.0 + SLACK)));
            of_rounded_norm_.push_back(above(unit * room * (1.0 + SLACK)));
            error_.push_back(unit * (error + p_.head[q] + room));
            own_.push_back(terms.squares > 0.0f ? -terms.squares * (1.0 - SLACK) : unit);
            inverse_.push_back(terms.normalized ? unit * p_.base[q] : 0.0);
            // Beyond fp32 a bound says nothing: NaN drops no row.
            const bool bounded =
                ordinary(p_.norm[q] * p_.norm[q]) && std::isfinite(float(error_.back())) &&
                std::isfinite(float(own_.back())) && std::isfinite(float(inverse_.back()));
            scales_.push_back(bounded ? float(unit * p_.codes[q].scale) : NAN);
            float* factors = factors_.data() + group.first * terms_ + i;
            factors[ERROR * group.size] = above(error_.back());
            if (terms_ > OWN) factors[OWN * group.size] = float(own_.back());
            if (terms_ > INVERSE) factors[INVERSE * group.size] = float(inverse_.back());
        }
}

void LadderBounds::prepare(const TileReader& tiles, Scan* scan) {
    const int64_t dims = p_.rows.ladder.dims.size(), own = SIGN_FACTOR + 2 * dims - 1;
    scan->row_scale = tiles.stat(CODE_SCALE, copies_[3]);
    scan->terms = terms_;
    scan->term_values[ERROR] = tiles.stat(CODE_ERROR, copies_[ERROR]);
    if (terms_ > OWN) scan->term_values[OWN] = tiles.stat(own, copies_[OWN]);
    if (terms_ > INVERSE) scan->term_values[INVERSE] = tiles.stat(own + dims, copies_[INVERSE]);
    const float code_norm = tiles.tile_stats()[CODE_NORM],
                rounded_norm = tiles.tile_stats()[ROUNDED_NORM];
    for (size_t i = 0; i < bases_.size(); ++i)
        bases_[i] = of_code_norm_[i] * code_norm + of_rounded_norm_[i] * rounded_norm;
}

void LadderBounds::of_group(const Panel::Group& group, Scan* scan) const {
    scan->query_scale = scales_.data() + group.first;
    scan->bases = bases_.data() + group.first;
    scan->term_factors = factors_.data() + group.first * terms_;
}

void LadderBounds::bound(size_t i, const Entry* entries, int64_t count, double gate,
                         std::vector<Final>* possible) {
    const CodedQuery& query = p_.codes[queries_[i]];
    const int64_t dims = p_.rows.ladder.dims.size(), own = SIGN_FACTOR + 2 * dims - 1;
    possible->clear();
    for (int64_t first = 0; first < count; first += ListedCodes::AT_ONCE) {
        const int64_t n = std::min(ListedCodes::AT_ONCE, count - first);
        float lows[ListedCodes::AT_ONCE];
        listed_.list(entries + first, n);
        listed_.sum_lows(query, lows);
        for (int64_t e = 0; e < n; ++e) {
            const Span& span = listed_.span(e);
            const float* tile = span.tile_stats + listed_.local(e) / TILE * TILE_STATS;
            const auto stat = [&](int64_t which) { return listed_.stat(e, which); };
            const double sum = entries[first + e].partial + double(lows[e]) / 16.0;
            double bound = sum * scales_[i] * stat(CODE_SCALE) +
                           error_[i] * stat(LOW_ERROR) * (1.0 + SLACK) +
                           double(of_code_norm_[i]) * tile[CODE_NORM] +
                           double(of_rounded_norm_[i]) * tile[ROUNDED_NORM];
            if (terms_ > OWN) bound += own_[i] * stat(own);
            if (terms_ > INVERSE) bound += inverse_[i] * stat(own + dims);
            // NaN, which says nothing, is beyond every gate; so is a row whose error is not known.
            if (std::isnan(bound) || std::isnan(stat(CODE_ERROR))) bound = INFINITY;
            if (!(bound < gate)) possible->push_back({bound, span.first + listed_.local(e)});
        }
    }
}

}  // namespace mrl
