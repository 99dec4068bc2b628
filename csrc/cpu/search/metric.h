// What a metric's scores are made of, one row a metric:
// score = (product · ⟨q, x⟩ − squares · (‖q‖² + ‖x‖²)) / (normalized ? ‖q‖ · ‖x‖ : 1),
// all of the columns of a prefix; 0 where a norm that is divided by is 0. A scan sums products,
// which say nothing of squares, or −Σ (q − x)² = 2⟨q, x⟩ − ‖q‖² − ‖x‖².
//
// A row here and its formula in mrl_fast/search/reference.py are all that a metric owes on the CPU.
#pragma once

#include "cpu/simd/kernels.h"

namespace mrl {

enum class Metric : int {};  // the number of a row of METRIC_TERMS

struct MetricTerms {
    const char* name;
    Source source;  // what a scan of columns sums for it
    float product, squares;
    bool normalized;
    // What a sum of a source is multiplied by in a score.
    constexpr float factor(Source of) const { return of == Source::DIFFERENCE ? squares : product; }
};

constexpr MetricTerms METRIC_TERMS[] = {
    {"ip", Source::PRODUCT, 1.0f, 0.0f, false},
    {"cosine", Source::PRODUCT, 1.0f, 0.0f, true},
    {"l2", Source::DIFFERENCE, 2.0f, 1.0f, false},  // −‖q − x‖²
#ifdef MRL_TEST_METRICS  // in tests/cpp: no coefficient is 1 where those above are
    {"test ip", Source::PRODUCT, 0.75f, 0.0f, false},
    {"test cosine", Source::PRODUCT, 3.0f, 0.0f, true},
    {"test l2", Source::DIFFERENCE, 1.0f, 0.5f, false},
#endif
};

constexpr float LARGEST_PRODUCT = 16.0f;  // bounds have room for what denormal sums lose, so often

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
