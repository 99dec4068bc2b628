// Shortlists by fp32 sums, with how far these can be off: they decide which rows are scored in
// fp64, where no bound drops rows.
#pragma once

#include <memory>

#include "cpu/search/bounds.h"

namespace mrl {

// Some queries' `keep` best rows among every step-th tile, by sums that order as scores do. A score
// is such a sum plus the query's `base` (−inf: not known); the sum is off by at most `error`
// (infinite: not known).
struct Shortlist {
    Shortlist(const Problem& p, const std::vector<int64_t>& which, int64_t most)
        : keep(most),
          entries(new Entry[which.size() * most + 1]),
          counts(which.size()),
          base(which.size(), -INFINITY),
          absolute(which.size(), INFINITY),
          data(p.some(which)) {}
    const Entry* of(int64_t i) const { return entries.get() + i * keep; }
    double score(int64_t i, int64_t rank) const { return score_of(of(i)[rank].key); }
    double error(int64_t i, double score) const { return absolute[i] + relative * std::abs(score); }
    bool holds(int64_t i) const { return std::isfinite(absolute[i]); }

    int64_t keep;
    std::unique_ptr<Entry[]> entries;
    std::vector<int64_t> counts;
    std::vector<double> base, absolute;
    double relative = 0.0;
    Gathered data;
    Status status = Status::OK;
};

// How a shortlist is made: of which queries, how long, of which tiles.
using MakeShortlist = Shortlist (*)(const Problem& p, const Rows& rows,
                                    const std::vector<int64_t>& which, int64_t keep, int64_t step,
                                    int threads);

// By canonical fp32 scores.
Shortlist shortlist_by_scores(const Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                              int64_t keep, int64_t step, int threads);

// By ⟨q, x − c⟩, c the mean of a sample of rows. What fp32 sums of these are off is a share of
// ‖x − c‖: little where rows differ by little beside their length.
Shortlist shortlist_by_differences(const Problem& p, const Rows& rows,
                                   const std::vector<int64_t>& which, int64_t keep, int64_t step,
                                   int threads);

// Whether so many rows score alike that such a shortlist would not hold all of the k best, by a
// sample of the rows and a group of the queries.
Status sees_alike(const Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                  MakeShortlist make, int threads, bool* alike);

// How many rows a scan keeps at first, and where more of them score alike: most ties end among
// these.
int64_t first_length(const Problem& p);
int64_t last_length(const Problem& p);

// Appends to `best` the fp64 scores of the rows among the first `keep` that may be among the k
// best. A query where others may be so too, because many rows score alike, goes to `undecided`.
Status scan_narrow(Problem& p, const Rows& rows, const std::vector<int64_t>& which,
                   MakeShortlist make, int64_t keep, int threads, std::vector<int64_t>* undecided,
                   std::vector<std::vector<Final>>* best);

}  // namespace mrl
