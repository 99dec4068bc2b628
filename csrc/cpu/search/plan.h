// How each query of an exact search is searched: by bounds, or through all rows.
#pragma once

#include "cpu/search/bounds.h"

namespace mrl {

struct Plan {
    std::vector<int64_t> bounded, full;  // queries
    std::vector<double> guess;           // [n]: what θ may be; −inf: not known
};

// Bounds are for the queries for which they pay, whose θ it raises. `tiles`: rows are read in
// tiles.
Status make_plan(Problem& p, bool tiles, int threads, Plan* plan);

// Leaves in `which` the queries for which bounds cost less than reading every row does, by a sample
// of the rows and a guess at each θ, and moves the others to `full`. Every step-th tile is in
// cache. Returns [n], by query: the columns a tile that bounds leave to be read.
std::vector<double> split(Problem& p, const std::vector<double>& guess, int64_t step, int threads,
                          std::vector<int64_t>* which, std::vector<int64_t>* full);

Panel panel_of(const Problem& p, const std::vector<int64_t>& which);

// Whether so many neighbours are wanted that choosing rows first costs more than scoring all in
// fp64.
bool many(const Problem& p);

}  // namespace mrl
