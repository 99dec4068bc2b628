// Exact search without bounds: every row's fp64 score, made by whole tiles. It costs about twice an
// fp32 scan, whatever the data: less than choosing rows first where very many have to be scored.
#pragma once

#include "cpu/search/bounds.h"

namespace mrl {

// Appends to the `best` of some of the queries at least the p.k best of these rows.
Status scan_wide(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                 std::vector<std::vector<Final>>* best);

}  // namespace mrl
