// Rows whose vectors are the same have one score, so a search of one row of each vector is a search
// of all rows.
#pragma once

#include "cpu/search/projected.h"

namespace mrl {

class EqualRows {
  public:
    static constexpr int64_t FEW = 8;
    // Compares the problem's rows, as `project` sorts them, that have the same sums. All rows count
    // as different, uncompared, where fewer than FEW rows share their sums on average, or where
    // most pairs of a sample that do are not equal.
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
