// Exact search without bounds: the fp64 score of every row, a tile at a time. It costs about twice
// an fp32 scan whatever the data, which is less than choosing rows first where very many have to be
// scored.
#pragma once

#include "cpu/search/bounds.h"

namespace mrl {

// Appends to best[q], for each query q of `which`, at least its p.k best rows.
Status scan_wide(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                 std::vector<std::vector<Final>>* best);

}  // namespace mrl
