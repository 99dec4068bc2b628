// Upper bounds on scores by the first columns of rows, for certified exact search.
//
// Let S be the sum over the columns before a level, and the tail the columns from there on:
//   ⟨q, x⟩ <= S + ‖q_tail‖·‖x_tail‖.
// Where the prefix has int8 codes, which stand for q̂ and x̂:
//   ⟨q, x⟩ <= ⟨q̂, x̂⟩ + ‖q − q̂‖·‖x̂‖ + ‖q‖·‖x − x̂‖ + ‖q_tail‖·‖x_tail‖.
// A ladder codes all columns of q − c and x − c, c a centre, both perhaps rotated; Ladder lists the
// terms that the centre adds.
// Each bound has room for the rounding of what it is computed from. A row is dropped where its
// bound is below θ, the k-th best fp64 score of the rows seen so far.
#pragma once

#include <atomic>
#include <cmath>

#include "cpu/search/ladder_bounds.h"
#include "cpu/search/scan.h"

namespace mrl {

constexpr int64_t CHUNK_TILES = 16;  // of a chunk, at most
constexpr int64_t CHUNK_ROWS = CHUNK_TILES * TILE;

struct Final {
    double score;
    int64_t row;
    bool operator<(const Final& other) const {  // a heap's front is the worst
        return score > other.score || (score == other.score && row < other.row);
    }
};

inline void raise(std::atomic<double>& value, double to) {
    double now = value.load(std::memory_order_relaxed);
    while (to > now && !value.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
}

// The fixed part of a search: its rows, and its queries with the norms that every bound needs.
struct Problem {
    Problem(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
            int64_t dim, int64_t k);
    Source source() const {
        return laddered()                        ? Source::NIBBLES
               : rows.code_dim && is_described() ? Source::CODES
                                                 : Source::PRODUCT;
    }
    // Whether the rows' statistics describe the columns that are searched: all columns, or exactly
    // the first prefix.
    bool is_described() const {
        const bool prefix =
            rows.ladder.dims.empty() && dim == std::max(rows.packed_dim, rows.code_dim);
        return is_whole() || prefix;
    }
    bool is_whole() const { return rows.width == 0 || dim == rows.width; }
    bool laddered() const { return !rows.ladder.dims.empty() && rows.ladder.dims.back() == dim; }
    bool coded() const { return of_codes(source()); }
    // The number of columns that the first bound reads.
    int64_t prefix() const { return laddered() ? dim : coded() ? rows.code_dim : rows.packed_dim; }
    // The bytes that a scan reads of each of them.
    double column_bytes() const { return laddered() ? 0.5 : coded() ? 1.0 : 4.0; }
    // How many tiles of codes serve all queries while they are in cache.
    int64_t chunk_tiles() const {
        constexpr int64_t CODES = 256 << 10;  // bytes
        return laddered() ? std::clamp<int64_t>(CODES / (TILE * dim), 1, CHUNK_TILES) : CHUNK_TILES;
    }
    // Whether a bound costs less than a score.
    bool prunes() const { return coded() || (prefix() > 0 && !levels.empty()); }
    double tail(int64_t q, size_t level) const {
        return level < levels.size() ? tails[q * levels.size() + level] : 0.0;
    }
    // A factor that turns inner products with this query into the metric's scores.
    double unit(int64_t q) const {
        if (terms.normalized) return norm[q] > 0.0 ? terms.product / norm[q] : 0.0;
        return terms.product;
    }
    // θ in the terms of a scan's gate: a row below this threshold has a score below θ.
    float threshold(int64_t q, double theta) const;
    // A score is made of Σ q·x or Σ (q − x)² and, where norms divide, of the row's norm.
    double scale() const {
        return terms.source == Source::DIFFERENCE ? -terms.squares : terms.product;
    }
    double score_of(int64_t q, double sum, double row_norm) const {
        if (!terms.normalized) return scale() * sum + 0.0;
        const double length = norm[q] * row_norm;
        return length > 0.0 ? terms.product * sum / length + 0.0 : 0.0;
    }
    Gathered some(const std::vector<int64_t>& which) const {
        return {which, dim, [&](int64_t q) { return data[q]; }};
    }
    // The searched columns of a row, written to `x`.
    const float* columns(int64_t row, std::vector<float>* x) const;
    // The fp64 score of a row; `x` is room for its columns.
    double score(int64_t q, int64_t row, std::vector<float>* x) const;

    const Kernels& kernels;
    const Rows& rows;  // read in place: none are gathered
    const Metric metric;
    const MetricTerms terms;
    const int64_t dim, k;
    const double margin;          // room for rounding, as a share of ‖q‖·‖x‖
    std::vector<int64_t> levels;  // the rows' levels; none where a prefix is searched
    std::vector<int64_t> stops;   // ends of the ranges of columns that follow the first bound
    std::vector<const float*> data;
    std::vector<double> norm, head;  // [n]: ‖q‖; the prefix's norm, less the centre
    std::vector<double> tails;       // [n, levels]: the norm of q from a level on
    std::vector<double> base;        // [n]: ⟨q, c⟩ − ‖c‖² where there is a centre, else 0
    double centre_norm;              // ‖c‖
    std::vector<CodedQuery> codes;
    std::vector<std::atomic<double>> theta;
    std::vector<std::atomic<int64_t>> touched;
};

// One thread's pass over chunks of rows for some of the queries.
class Pass {
  public:
    std::vector<std::vector<Final>> heaps;  // [queries]: the k best; a heap once there are k
    std::vector<int64_t> columns_read;      // [queries]

    Pass(Problem& problem, const std::vector<int64_t>& queries, const Panel& panel)
        : heaps(queries.size()),
          columns_read(queries.size()),
          p_(problem),
          queries_(queries),
          panel_(panel),
          source_(p_.source()),
          reader_(p_.kernels, p_.rows, source_, problem.prefix(), panel.groups().size()),
          ladder_(problem, queries, panel),
          thetas_(queries.size()),
          thresholds_(queries.size()),
          scales_(queries.size()),
          factors_(TERMS * queries.size()),
          entries_(new Entry[queries.size() * (CHUNK_ROWS + 1)]),
          late_(queries.size()) {
        for (size_t i = 0; i < queries.size(); ++i)
            // k is as large as the room: every row that passes its gate is kept.
            topks_.push_back(
                {entries_.get() + i * (CHUNK_ROWS + 1), 0, CHUNK_ROWS + 1, CHUNK_ROWS + 1});
        for (const Panel::Group& group : panel.groups())
            for (int64_t i = 0; i < group.size && !p_.laddered(); ++i) factor(group, i);
    }

    // A guess at each query's θ, and the number of columns beyond which counting may stop.
    struct Trial {
        const std::vector<double>& theta;
        double budget;
    };
    // Scans tiles [begin, end), at most a chunk; false if a value is not finite. A trial finds no
    // rows: it only adds to columns_read.
    bool run(int64_t begin, int64_t end, const Trial* trial);
    // Scores the rows that still wait for it; to be called after the last chunk.
    void score_late();

  private:
    void factor(const Panel::Group& group, int64_t i);
    void prepare(Scan* scan);
    void of_group(const Panel::Group& group, Scan* scan) const;
    void finish(size_t i, bool counting);
    void finish_ladder(size_t i, bool counting);
    void score_late(size_t i);
    void keep(size_t i, const Final& final);
    bool possible(size_t i, const Span& span, int64_t local, double sum, size_t level) const;

    Problem& p_;
    const std::vector<int64_t>& queries_;
    const Panel& panel_;
    const Source source_;
    TileReader reader_;
    LadderBounds ladder_;
    std::vector<double> thetas_;
    std::vector<float> thresholds_, scales_, factors_;  // factors: [groups, TERMS, size]
    std::unique_ptr<Entry[]> entries_;
    std::vector<TopK> topks_;
    // Zeros at first: a factor of 0 times what happens to lie in memory could be NaN.
    float row_scale_[TILE] = {}, terms_[TERMS][TILE] = {};
    std::vector<Final> possible_;           // rows with their bounds
    std::vector<std::vector<Final>> late_;  // [queries]: those that are to be scored
    bool on_disk_ = false;                  // whether rows had to be read from disk
    std::vector<float> vector_, sums_, squares_;
    std::vector<int64_t> local_;
    std::vector<const Span*> spans_;
    std::vector<RowColumns> pointers_;
};

}  // namespace mrl
