// The terms of each metric's scores, one row a metric:
// score = (product · ⟨q, x⟩ − squares · (‖q‖² + ‖x‖²)) / (normalized ? ‖q‖ · ‖x‖ : 1),
// over the columns of a prefix; 0 where a norm that divides is 0. A scan sums either products,
// Σ q·x, for metrics without squares, or −Σ (q − x)² = 2⟨q, x⟩ − ‖q‖² − ‖x‖².
//
// On the CPU a new metric needs a row here and its formula in mrl_fast/search/reference.py.
#pragma once

#include "cpu/simd/kernels.h"

namespace mrl {

enum class Metric : int {};  // the number of a row of METRIC_TERMS

struct MetricTerms {
    const char* name;
    Source source;  // what a scan of columns sums for it
    float product, squares;
    bool normalized;
    // The factor of a source's sum in a score.
    constexpr float factor(Source of) const { return of == Source::DIFFERENCE ? squares : product; }
};

constexpr MetricTerms METRIC_TERMS[] = {
    {"ip", Source::PRODUCT, 1.0f, 0.0f, false},
    {"cosine", Source::PRODUCT, 1.0f, 0.0f, true},
    {"l2", Source::DIFFERENCE, 2.0f, 1.0f, false},  // −‖q − x‖²
#ifdef MRL_TEST_METRICS  // for tests/cpp: no coefficient is 1 where that of the metric above is
    {"test ip", Source::PRODUCT, 0.75f, 0.0f, false},
    {"test cosine", Source::PRODUCT, 3.0f, 0.0f, true},
    {"test l2", Source::DIFFERENCE, 1.0f, 0.5f, false},
#endif
};

// Bounds have room for what sums of denormal products lose, times this.
constexpr float LARGEST_PRODUCT = 16.0f;

constexpr bool all_metrics_are_summed() {
    for (const MetricTerms& m : METRIC_TERMS) {
        const bool products = m.source == Source::PRODUCT && m.squares == 0.0f;
        const bool differences =
            m.source == Source::DIFFERENCE && m.product == 2.0f * m.squares && !m.normalized;
        if (!(products || differences) || !(m.product > 0.0f && m.product <= LARGEST_PRODUCT))
            return false;
    }
    return true;
}
static_assert(all_metrics_are_summed(),
              "a metric is of products without squares, or of differences, where product is twice "
              "squares and no norm divides; and 0 < product <= LARGEST_PRODUCT");

constexpr const MetricTerms& terms_of(Metric metric) { return METRIC_TERMS[int(metric)]; }

}  // namespace mrl
