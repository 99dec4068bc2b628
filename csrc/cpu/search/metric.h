// What a metric's scores are made of, one row a metric:
// score = (product · ⟨q, x⟩ − squares · (‖q‖² + ‖x‖²)) / (normalized ? ‖q‖ · ‖x‖ : 1),
// all of the columns of a prefix; 0 where a norm that is divided by is 0.
#pragma once

#include "cpu/simd/kernels.h"

namespace mrl {

struct MetricTerms {
    Source source;  // what a scan of columns sums for it
    float product;
    bool squares, normalized;
};

inline const MetricTerms& terms_of(Metric metric) {
    static constexpr MetricTerms TERMS_OF[] = {
        {Source::PRODUCT, 1.0f, false, false},   // IP
        {Source::PRODUCT, 1.0f, false, true},    // COSINE
        {Source::DIFFERENCE, 2.0f, true, false}  // L2: −‖q − x‖²
    };
    return TERMS_OF[int(metric)];
}

}  // namespace mrl
