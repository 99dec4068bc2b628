#include <cmath>
#include <cstring>

#include "cpu/training/blocks.h"

namespace mrl {
namespace {

// Runs each(scratch, scores, first row, rows, tile) on each block of a chunk, tiles in order for a
// group of rows; before(scratch, group) and after(scratch, group, begin, end) around them.
template <class Scratch, class Before, class Each, class After>
void walk(const Kernels& kernels, const Scores& s, int threads, const Before& before,
          const Each& each, const After& after) {
    const int64_t tiles = blocks_of(s.cols, TILE), depth = s.dims.back();
    const int64_t depth_blocks = blocks_of(depth, TILE), groups = blocks_of(s.rows, GROUP_ROWS);
    const std::vector<Step> steps = steps_of(s.dims);
    const Buffer w(tiles * depth * TILE);
    for_each(threads, tiles,
             [&](int64_t t) { pack_tile(kernels, s, t, w.get() + t * depth * TILE); });
    Ranges ranges(groups, 1);
    parallel(threads, [&](int) {
        const Buffer x(depth_blocks * GROUP_ROWS * TILE);
        const Buffer scores(int64_t(s.dims.size()) * ROWS * TILE);
        Scratch scratch(s);
        for (int64_t group, last; ranges.next(&group, &last);) {
            const int64_t begin = group * GROUP_ROWS, end = std::min(s.rows, begin + GROUP_ROWS);
            const int64_t apart = GROUP_ROWS * TILE;
            pack_blocks(s.x, begin, end, depth, x.get(), apart);
            before(scratch, group);
            for (int64_t t = 0; t < tiles; ++t)
                for (int64_t row = begin; row < end; row += ROWS) {
                    const int rows = int(std::min<int64_t>(ROWS, end - row));
                    make_scores(kernels, steps, x.get() + (row - begin) * TILE, apart, rows,
                                w.get() + t * depth * TILE, scores.get());
                    each(scratch, scores.get(), row, rows, t);
                }
            after(scratch, group, begin, end);
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

}  // namespace

void fold(const Kernels& kernels, const Scores& s, int threads, float* row_max, double* row_sum,
          int64_t* labels, double* soft_sum, float* hit, float* col_max, double* col_sum) {
    if (!s.rows || !s.cols) return;
    threads = threads_for(s, threads);
    const int width = kernels.width;
    const int64_t G = int64_t(s.dims.size()), tiles = blocks_of(s.cols, TILE);
    const Columns columns(s, tiles);
    // Column statistics of each group of rows: ref, top and sum [G, tiles · TILE].
    const int64_t groups = blocks_of(s.rows, GROUP_ROWS), part = G * columns.apart;
    std::vector<float> parts(col_max ? groups * 3 * part : 0);
    const auto statistics = [&](GroupStatistics& scratch, int64_t row, int64_t tile) {
        const int64_t block = row % GROUP_ROWS / ROWS * scratch.prefixes * ROWS;
        Statistics to = {};
        to.ref = scratch.ref.data() + block;
        to.top = scratch.top.data() + block * MAX_WIDTH;
        to.sum = scratch.sum.data() + block * MAX_WIDTH;
        to.best = labels ? scratch.best.data() + block * MAX_WIDTH : nullptr;
        to.weight = scratch.weight.data() + row % GROUP_ROWS / ROWS * ROWS;
        to.soft = scratch.soft.data() + block;
        to.hit = hit ? hit + row : nullptr;
        to.hit_apart = s.rows;
        if (col_max) {
            to.col_ref = parts.data() + row / GROUP_ROWS * 3 * part + tile * TILE;
            to.col_top = to.col_ref + part;
            to.col_sum = to.col_top + part;
            to.stats_apart = columns.apart;
        }
        return to;
    };
    walk<GroupStatistics>(
        kernels, s, threads,
        [&](GroupStatistics& scratch, int64_t group) {
            scratch.reset();
            if (!col_max) return;
            float* ref = parts.data() + group * 3 * part;
            std::fill(ref, ref + part, LOWEST_SCORE);
            std::fill(ref + part, ref + 2 * part, NEGATIVE_INFINITY);
            std::fill(ref + 2 * part, ref + 3 * part, 0.0f);
        },
        [&](GroupStatistics& scratch, const float* scores, int64_t row, int rows, int64_t tile) {
            kernels.fold_block(block_of(s, columns, scores, row, rows, tile),
                               statistics(scratch, row, tile));
        },
        [&](GroupStatistics& scratch, int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                for (int64_t g = 0; g < G; ++g) {
                    const Statistics from = statistics(scratch, row, 0);
                    const int64_t at = g * ROWS + (row - begin) % ROWS, out = g * s.rows + row;
                    const float* top = from.top + at * MAX_WIDTH;
                    const float* sum = from.sum + at * MAX_WIDTH;
                    const auto column = [&](int lane) {
                        return from.best[at * MAX_WIDTH + lane] + lane;
                    };
                    int best = 0;
                    double total = 0.0;  // a sure score's 1 beside the small rest
                    for (int lane = 0; lane < width; ++lane) {
                        total += sum[lane];
                        if (top[lane] > top[best] ||
                            (labels && top[lane] == top[best] && column(lane) < column(best)))
                            best = lane;
                    }
                    if (s.sigmoid) {
                        row_sum[out] += total;
                        continue;
                    }
                    if (labels && top[best] > row_max[out]) labels[out] = column(best);
                    merge(row_max + out, row_sum + out, top[best], total, from.ref[at]);
                    if (soft_sum)
                        soft_sum[out] +=
                            from.soft[at] + double(from.ref[at]) * from.weight[at % ROWS];
                }
            }
        });
    if (col_max)
        for (int64_t g = 0; g < G; ++g)
            for (int64_t c = 0; c < s.cols; ++c) {
                float max = NEGATIVE_INFINITY;
                double sum = 0.0;
                for (int64_t group = 0; group < groups; ++group) {
                    const float* ref = parts.data() + group * 3 * part + g * columns.apart + c;
                    merge(&max, &sum, ref[part], ref[2 * part], ref[0]);
                }
                col_max[g * s.cols_apart + c] = max;
                col_sum[g * s.cols_apart + c] = sum;
            }
}

void store_scores(const Kernels& kernels, const Scores& s, int threads, float* out,
                  int64_t out_apart, int64_t out_stride) {
    if (!s.rows || !s.cols) return;
    struct None {
        explicit None(const Scores&) {}
    };
    walk<None>(
        kernels, s, threads_for(s, threads), [](None&, int64_t) {},
        [&](None&, const float* scores, int64_t row, int rows, int64_t tile) {
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
        },
        [](None&, int64_t, int64_t, int64_t) {});
}

}  // namespace mrl
