// A ladder's codes of listed rows, summed row by row: for shortlists, and for bounds of the rows
// that a scan leaves. Sums are of integers, and exact.
#pragma once

#include "cpu/search/scan.h"

namespace mrl {

// Rows that are summed at once: few enough that all are prefetched.
class ListedCodes {
  public:
    static constexpr int64_t AT_ONCE = 16;
    ListedCodes(const Kernels& kernels, const Rows& rows);

    // Makes the rows of n entries the listed ones, and prefetches their last four bits.
    void list(const Entry* entries, int64_t n);
    // Σ of a query's codes with the numbers that the last four bits of each listed row stand for.
    void sum_lows(const CodedQuery& query, float* sums) const;
    // The same of the first four; `by_step` are the query's codes as these lie, low halves first.
    void sum_nibbles(const CodedQuery& query, const int8_t* by_step, float* sums);

    const Span& span(int64_t e) const { return *spans_[e]; }
    int64_t local(int64_t e) const { return locals_[e]; }  // counted from the span's first row
    double stat(int64_t e, int64_t which) const {
        return double(spans_[e]->stats[which * spans_[e]->stats_stride + locals_[e]]);
    }

  private:
    void sum(const uint8_t** rows, const int8_t* query, float shift, float* sums) const;
    const Kernels& kernels_;
    const Rows& rows_;
    const int64_t bytes_;  // of each half of a row's codes
    int64_t count_ = 0;
    const Span* spans_[AT_ONCE];
    int64_t locals_[AT_ONCE];
    std::vector<uint8_t> nibbles_;  // [AT_ONCE, bytes], gathered from tiles
};

// Ranks one query's shortlist by codes of all columns.
class CodeRanker {
  public:
    CodeRanker(const Kernels& kernels, const Rows& rows, const float* query, Metric metric);
    // Leaves the `keep` best by four bits or by eight, in order; `from` bits are summed already.
    // The scores are fp64 until they are rounded to be compared, the same by any kernels.
    Status rank(int64_t from, int64_t bits, int64_t keep, std::vector<Entry>& candidates);

  private:
    void score(Entry* entries, int64_t n, int64_t from, int64_t bits);
    const Rows& rows_;
    CodedQuery query_;
    std::vector<int8_t> by_step_;  // [2, bytes]: its codes, those of low halves of a step first
    ListedCodes listed_;
    double unit_, own_, inverse_;  // factors of ⟨p, y⟩, of a row's term and of its inverse norm
    bool has_terms_, has_inverse_;
};

}  // namespace mrl
