// The forward: chunks of nested scores folded into statistics, or stored.
#include <cmath>
#include <cstring>

#include "cpu/training/blocks.h"

namespace mrl {
namespace {

// Shows each block of a chunk's scores to a visitor, tiles in order for a group of rows:
// begin(scratch, group), then block(scratch, scores, first row, rows, tile), end(scratch, group).
// A thread has one Scratch.
template <class Visitor>
void walk(const Run& run, const Scores& s, const Visitor& visitor) {
    const int threads = threads_for(s, run.threads);
    const int64_t tiles = blocks_of(s.cols, TILE), depth = s.dims.back();
    const int64_t depth_blocks = blocks_of(depth, TILE);
    const std::vector<Step> steps = steps_of(s.dims);
    const Buffer w(tiles * depth * TILE);
    for_each(threads, tiles,
             [&](int64_t t) { pack_tile(run.kernels, s, t, w.get() + t * depth * TILE); });
    Ranges ranges(blocks_of(s.rows, GROUP_ROWS), 1);
    parallel(threads, [&](int) {
        const Buffer x(depth_blocks * GROUP_ROWS * TILE);
        const Buffer scores(int64_t(s.dims.size()) * ROWS * TILE);
        typename Visitor::Scratch scratch(s);
        for (int64_t group, last; ranges.next(&group, &last);) {
            const int64_t begin = group * GROUP_ROWS, end = std::min(s.rows, begin + GROUP_ROWS);
            const int64_t apart = GROUP_ROWS * TILE;
            pack_blocks(s.x, begin, end, depth, x.get(), apart);
            visitor.begin(scratch, group);
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t row = begin; row < end; row += ROWS) {
                    const int rows = int(std::min<int64_t>(ROWS, end - row));
                    make_scores(run.kernels, steps, x.get() + (row - begin) * TILE, apart, rows,
                                w.get() + t * depth * TILE, scores.get());
                    visitor.block(scratch, scores.get(), row, rows, t);
                }
            visitor.end(scratch, group);
        }
    });
}

// Statistics of the rows of a group.
struct GroupStatistics {
    explicit GroupStatistics(const Scores& s)
        : prefixes(int64_t(s.dims.size())),
          ref(rows()),
          top(rows() * MAX_WIDTH),
          sum(top.size()),
          best(top.size()),
          soft(rows()),
          weight(GROUP_ROWS) {}
    int64_t rows() const { return prefixes * GROUP_ROWS; }
    void reset() {
        std::fill(ref.begin(), ref.end(), LOWEST_SCORE);
        std::fill(weight.begin(), weight.end(), 0.0);
        std::fill(top.begin(), top.end(), NEGATIVE_INFINITY);
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(best.begin(), best.end(), 0);
        std::fill(soft.begin(), soft.end(), 0.0);
    }
    int64_t prefixes;
    std::vector<float> ref, top, sum;  // [blocks of rows][prefixes, ROWS(, MAX_WIDTH)]
    std::vector<int32_t> best;
    std::vector<double> soft, weight;
};

// Continues (maximum, Σ exp(y − maximum)) with another one, whose sum is relative to `ref`.
void merge(float* max, double* sum, float top, double more, float ref) {
    const float largest = top > *max ? top : *max;
    if (more != 0.0) more *= std::exp(double(ref) - largest);
    if (*sum != 0.0) more += *sum * std::exp(double(*max) - largest);
    *max = largest;
    *sum = more;
}

// Folds a chunk's blocks into statistics, and those into the caller's.
class Folder {
  public:
    using Scratch = GroupStatistics;

    Folder(const Kernels& kernels, const Scores& s, const FoldOutput& out)
        : kernels_(kernels),
          s_(s),
          out_(out),
          prefixes_(int64_t(s.dims.size())),
          columns_(s, blocks_of(s.cols, TILE)),
          plane_(prefixes_ * columns_.apart),
          column_parts_(out.col_max ? blocks_of(s.rows, GROUP_ROWS) * 3 * plane_ : 0) {}

    void begin(Scratch& scratch, int64_t group) const {
        scratch.reset();
        if (!out_.col_max) return;
        float* ref = column_part(group);
        std::fill(ref, ref + plane_, LOWEST_SCORE);
        std::fill(ref + plane_, ref + 2 * plane_, NEGATIVE_INFINITY);
        std::fill(ref + 2 * plane_, ref + 3 * plane_, 0.0f);
    }

    void block(Scratch& scratch, const float* scores, int64_t row, int rows, int64_t tile) const {
        kernels_.fold_block(block_of(s_, columns_, scores, row, rows, tile),
                            statistics(scratch, row, tile));
    }

    void end(Scratch& scratch, int64_t group) const {
        const int64_t begin = group * GROUP_ROWS, end = std::min(s_.rows, begin + GROUP_ROWS);
        for (int64_t row = begin; row < end; ++row)
            for (int64_t g = 0; g < prefixes_; ++g)
                fold_lanes(statistics(scratch, row, 0), g, row, (row - begin) % ROWS);
    }

    // Merges the column statistics of all groups, once these are done.
    void fold_columns() const {
        if (!out_.col_max) return;
        const int64_t groups = blocks_of(s_.rows, GROUP_ROWS);
        for (int64_t g = 0; g < prefixes_; ++g)
            for (int64_t c = 0; c < s_.cols; ++c) {
                float max = NEGATIVE_INFINITY;
                double sum = 0.0;
                for (int64_t group = 0; group < groups; ++group) {
                    const float* ref = column_part(group) + g * columns_.apart + c;
                    merge(&max, &sum, ref[plane_], ref[2 * plane_], ref[0]);
                }
                out_.col_max[g * s_.cols_apart + c] = max;
                out_.col_sum[g * s_.cols_apart + c] = sum;
            }
    }

  private:
    float* column_part(int64_t group) const { return column_parts_.get() + group * 3 * plane_; }

    // The addresses of the statistics of a block of rows and a tile of columns.
    Statistics statistics(Scratch& scratch, int64_t row, int64_t tile) const {
        const int64_t block = row % GROUP_ROWS / ROWS * prefixes_ * ROWS;
        Statistics to = {};
        to.ref = scratch.ref.data() + block;
        to.top = scratch.top.data() + block * MAX_WIDTH;
        to.sum = scratch.sum.data() + block * MAX_WIDTH;
        to.best = out_.labels ? scratch.best.data() + block * MAX_WIDTH : nullptr;
        to.weight = scratch.weight.data() + row % GROUP_ROWS / ROWS * ROWS;
        to.soft = scratch.soft.data() + block;
        to.hit = out_.hit ? out_.hit + row : nullptr;
        to.hit_apart = s_.rows;
        if (out_.col_max) {
            to.col_ref = column_part(row / GROUP_ROWS) + tile * TILE;
            to.col_top = to.col_ref + plane_;
            to.col_sum = to.col_top + plane_;
            to.stats_apart = columns_.apart;
        }
        return to;
    }

    // One row and prefix: the lanes of its statistics into the caller's.
    void fold_lanes(const Statistics& from, int64_t g, int64_t row, int64_t r) const {
        const int64_t at = g * ROWS + r, out = g * s_.rows + row;
        const float *top = from.top + at * MAX_WIDTH, *sum = from.sum + at * MAX_WIDTH;
        const auto column = [&](int lane) { return from.best[at * MAX_WIDTH + lane] + lane; };
        int best = 0;
        double total = 0.0;  // in fp64: the largest score adds 1, and the others may be tiny
        for (int lane = 0; lane < kernels_.width; ++lane) {
            total += sum[lane];
            if (top[lane] > top[best] ||
                (out_.labels && top[lane] == top[best] && column(lane) < column(best)))
                best = lane;
        }
        if (s_.sigmoid) {
            out_.row_sum[out] += total;
            return;
        }
        if (out_.labels && top[best] > out_.row_max[out]) out_.labels[out] = column(best);
        merge(out_.row_max + out, out_.row_sum + out, top[best], total, from.ref[at]);
        if (out_.soft_sum)
            out_.soft_sum[out] += from.soft[at] + double(from.ref[at]) * from.weight[r];
    }

    const Kernels& kernels_;
    const Scores& s_;
    const FoldOutput& out_;
    const int64_t prefixes_;
    const Columns columns_;
    const int64_t plane_;        // [prefixes, tiles · TILE]
    const Buffer column_parts_;  // [groups of rows][ref, top, sum][plane]
};

// Copies a chunk's scores, and adds the bias.
struct ScoreWriter {
    struct Scratch {
        explicit Scratch(const Scores&) {}
    };
    void begin(Scratch&, int64_t) const {}
    void block(Scratch&, const float* scores, int64_t row, int rows, int64_t tile) const {
        const int64_t col = tile * TILE, cols = std::min<int64_t>(TILE, s.cols - col);
        for (size_t g = 0; g < s.dims.size(); ++g)
            for (int r = 0; r < rows; ++r) {
                const float* from = scores + (g * ROWS + r) * TILE;
                float* to = out + g * out_apart + (row + r) * out_stride + col;
                if (s.bias)
                    for (int64_t c = 0; c < cols; ++c) to[c] = from[c] + s.bias[col + c];
                else
                    std::memcpy(to, from, cols * sizeof(float));
            }
    }
    void end(Scratch&, int64_t) const {}

    const Scores& s;
    float* out;
    int64_t out_apart, out_stride;
};

}  // namespace

void fold(const Run& run, const Scores& s, const FoldOutput& out) {
    if (!s.rows || !s.cols) return;
    const Folder folder(run.kernels, s, out);
    walk(run, s, folder);
    folder.fold_columns();
}

void store_scores(const Run& run, const Scores& s, float* out, int64_t out_apart,
                  int64_t out_stride) {
    if (!s.rows || !s.cols) return;
    walk(run, s, ScoreWriter{s, out, out_apart, out_stride});
}

}  // namespace mrl
