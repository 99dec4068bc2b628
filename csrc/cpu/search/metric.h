// What a metric's scores are made of, one row a metric:
// score = (product · ⟨q, x⟩ − squares · (‖q‖² + ‖x‖²)) / (normalized ? ‖q‖ · ‖x‖ : 1),
// all of the columns of a prefix; 0 where a norm that is divided by is 0.
// A sum of differences is −(‖q‖² + ‖x‖² − 2⟨q, x⟩): where squares count, product is 2. Read by
// Scaling and advance_all (scan.cpp), Problem and Pass (bounds.cpp), shortlists (shortlist.cpp,
// differences.cpp), scan_wide (wide.cpp).
#pragma once

#include "cpu/simd/kernels.h"

namespace mrl {

enum class Metric : int { IP, COSINE, L2 };  // in the order of METRIC_TERMS

struct MetricTerms {
    const char* name;
    Source source;  // what a scan of columns sums for it
    float product;
    bool squares, normalized;
};

constexpr MetricTerms METRIC_TERMS[] = {
    {"ip", Source::PRODUCT, 1.0f, false, false},
    {"cosine", Source::PRODUCT, 1.0f, false, true},
    {"l2", Source::DIFFERENCE, 2.0f, true, false},  // −‖q − x‖²
};

inline const MetricTerms& terms_of(Metric metric) { return METRIC_TERMS[int(metric)]; }

}  // namespace mrl
