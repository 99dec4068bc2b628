// Rows whose vectors are the same: they have one score, so a search of the first of each is a
// search of all.
#pragma once

#include "cpu/search/projected.h"

namespace mrl {

class EqualRows {
  public:
    static constexpr int64_t FEW = 8;
    // Of the problem's rows, as `project` has them. They are not compared, and count as different,
    // where there are fewer than FEW of each, or a sample says so.
    EqualRows(const Problem& p, const std::vector<Projected>& sorted, int threads);
    // How many different vectors there are.
    int64_t count() const { return distinct_; }
    // The first row of each vector.
    Rows firsts(const Rows& rows) const { return rows.restricted(mask_.data()); }
    // The k best of all rows from the k best of `firsts`, best first.
    std::vector<Final> expand(const std::vector<Final>& firsts, int64_t k) const;

  private:
    std::vector<uint64_t> mask_;
    std::vector<std::pair<int64_t, int64_t>> members_;  // (first row, row), ascending
    int64_t distinct_ = 0;
};

}  // namespace mrl
