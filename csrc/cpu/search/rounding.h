// How far fp32 scores are from fp64 ones.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "cpu/search/bounds.h"

namespace mrl {

// The least and the greatest norm of a row that is not 0.
inline std::pair<double, double> norms(const Rows& rows) {
    float least = INFINITY, greatest = 0.0f;
    auto see = [&](const Span& span, int64_t row) {
        const float* stats = span.stats + row;
        const float tail = rows.levels.empty() ? 0.0f : stats[TAIL_NORM * span.stats_stride],
                    norm = stats[PREFIX_NORM * span.stats_stride] + tail;  // within a factor √2
        greatest = std::max(greatest, norm);
        if (norm > 0.0f) least = std::min(least, norm);
    };
    if (rows.gathered_rows.empty())
        for (const Span& span : rows.spans)
            for (int64_t row = 0; row < span.rows; ++row) see(span, row);
    for (int64_t row : rows.gathered_rows) {
        const Span& span = span_of(rows, row);
        see(span, row - span.first);
    }
    return {least * 0.7, greatest};
}

// By how much a canonical fp32 score can differ from the fp64 one.
class Rounding {
  public:
    Rounding(const Problem& p, const Rows& rows) : p_(p) {
        std::tie(least_, greatest_) = norms(rows);
    }
    double of(int64_t q, double score) const {
        if (p_.terms.source == Source::DIFFERENCE) return 4.0 * p_.margin * std::abs(score) + 1e-36;
        if (p_.terms.normalized) return 3.0 * p_.terms.product * p_.margin;
        return p_.terms.product * p_.margin * p_.norm[q] * greatest_ + 1e-36;
    }
    // Whether that holds: not where squares leave fp32.
    bool holds(int64_t q) const {
        return ordinary(p_.norm[q] * p_.norm[q]) && greatest_ * greatest_ < LARGEST &&
               (least_ * least_ > SMALLEST || least_ > greatest_);
    }

  private:
    const Problem& p_;
    double least_, greatest_;
};

}  // namespace mrl
