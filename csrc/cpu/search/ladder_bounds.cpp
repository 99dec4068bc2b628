#include "cpu/search/ladder_bounds.h"

#include "cpu/search/bounds.h"

namespace mrl {

LadderBounds::LadderBounds(const Problem& problem, const std::vector<int64_t>& queries,
                           const Panel& panel)
    : p_(problem), queries_(queries) {
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
            scales_.push_back(ordinary(p_.norm[q] * p_.norm[q]) ? float(unit * p_.codes[q].scale)
                                                                : NAN);
            of_code_norm_.push_back(above(unit * error * (1.0 + SLACK)));
            of_both_norms_.push_back(above(unit * room * (1.0 + SLACK)));
            error_.push_back(unit * (error + p_.head[q] + room));
            own_.push_back(terms.squares > 0.0f ? -terms.squares * (1.0 - SLACK) : unit);
            inverse_.push_back(terms.normalized ? unit * p_.base[q] : 0.0);
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
                both_norms = tiles.tile_stats()[BOTH_NORMS];
    for (size_t i = 0; i < bases_.size(); ++i)
        bases_[i] = of_code_norm_[i] * code_norm + of_both_norms_[i] * both_norms;
}

void LadderBounds::of_group(const Panel::Group& group, Scan* scan) const {
    scan->query_scale = scales_.data() + group.first;
    scan->bases = bases_.data() + group.first;
    scan->term_factors = factors_.data() + group.first * terms_;
}

void LadderBounds::bound(size_t i, const Entry* entries, int64_t count, double gate,
                         std::vector<Final>* possible) {
    constexpr int64_t AHEAD = 4;  // rows
    const CodedQuery& query = p_.codes[queries_[i]];
    const int64_t dims = p_.rows.ladder.dims.size(), own = SIGN_FACTOR + 2 * dims - 1,
                  bytes = low_bytes(p_.dim);
    places_.resize(count);
    for (int64_t e = 0; e < count; ++e) {
        const int64_t row = row_of(entries[e].key);
        const Span& span = span_of(p_.rows, row);
        places_[e] = {&span, row - span.first};
    }
    const auto stat = [&](const Place& at, int64_t which) {
        return at.span->stats + which * at.span->stats_stride + at.row;
    };
    const auto prefetch = [&](const Place& at) {
        for (int64_t byte = 0; byte < bytes; byte += 64)
            __builtin_prefetch(at.span->lows + at.row * bytes + byte);
        __builtin_prefetch(stat(at, LOW_ERROR));
    };
    possible->clear();
    for (int64_t e = 0; e < std::min(count, AHEAD); ++e) prefetch(places_[e]);
    for (int64_t e = 0; e < count; ++e) {
        if (e + AHEAD < count) prefetch(places_[e + AHEAD]);
        const Place& at = places_[e];
        const float* tile = at.span->tile_stats + at.row / TILE * TILE_STATS;
        const int32_t dot =
            p_.kernels.dot_halves(at.span->lows + at.row * bytes, query.plain.data(), bytes);
        const double sum = entries[e].partial + (dot + double(query.shift)) / 16.0;
        double bound = sum * scales_[i] * *stat(at, CODE_SCALE) +
                       error_[i] * *stat(at, LOW_ERROR) * (1.0 + SLACK) +
                       double(of_code_norm_[i]) * tile[CODE_NORM] +
                       double(of_both_norms_[i]) * tile[BOTH_NORMS];
        if (terms_ > OWN) bound += own_[i] * *stat(at, own);
        if (terms_ > INVERSE) bound += inverse_[i] * *stat(at, own + dims);
        // NaN, which says nothing, is beyond every gate; so is a row whose error is not known.
        if (std::isnan(bound) || std::isnan(*stat(at, CODE_ERROR))) bound = INFINITY;
        if (bound >= gate || std::isnan(gate)) possible->push_back({bound, at.span->first + at.row});
    }
}

}  // namespace mrl
