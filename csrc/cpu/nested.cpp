#include "cpu/nested.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/parallel.h"

namespace mrl {
namespace {

constexpr int64_t GROUP_ROWS = 2 * ROWS;     // rows that share a tile of columns while it is in L2
constexpr int64_t SEGMENT_ROWS = 5 * ROWS;   // rows of a unit of work of the backward
constexpr double MULTIPLIES_A_THREAD = 2e6;  // below this, starting a thread costs more
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Memory that is written before it is read.
struct Buffer {
    explicit Buffer(int64_t size) : data(new float[std::max<int64_t>(size, 1)]) {}
    float* get() const { return data.get(); }
    std::unique_ptr<float[]> data;
};

int threads_for(const Scores& s, int threads) {
    const double multiplies = double(s.rows) * s.cols * s.dims.back();
    return int(std::max(1.0, std::min(double(threads), multiplies / MULTIPLIES_A_THREAD)));
}

// Runs fn(unit) for every unit, a few at a time.
template <class Fn>
void for_each(int threads, int64_t units, const Fn& fn) {
    Ranges ranges(units, 1);
    parallel(int(std::min<int64_t>(threads, std::max<int64_t>(units, 1))), [&](int) {
        for (int64_t unit, last; ranges.next(&unit, &last);)
            for (; unit < last; ++unit) fn(unit);
    });
}

// Rows [begin, end) of a matrix as [blocks of TILE columns][end − begin][TILE], padded with 0;
// blocks `apart` apart.
void pack_blocks(Matrix m, int64_t begin, int64_t end, int64_t cols, float* out, int64_t apart) {
    for (int64_t c = 0; c < cols; c += TILE, out += apart) {
        const int64_t width = std::min<int64_t>(TILE, cols - c);
        for (int64_t r = begin; r < end; ++r) {
            float* to = out + (r - begin) * TILE;
            std::memcpy(to, m.data + r * m.stride + c, width * sizeof(float));
            std::fill(to + width, to + TILE, 0.0f);
        }
    }
}

// Columns of scores, rows of w, as vertical tiles [blocks][depth, TILE].
void pack_tile(const Kernels& kernels, const Scores& s, int64_t tile, float* out) {
    const void* rows[TILE];
    const int n = int(std::min<int64_t>(TILE, s.cols - tile * TILE));
    for (int r = 0; r < n; ++r) rows[r] = s.w.data + (tile * TILE + r) * s.w.stride;
    kernels.pack(rows, DType::F32, n, s.dims.back(), out);
}

// A depth of a product that neither crosses a block of columns nor a slab's end.
struct Step {
    int64_t begin, end;
    int prefix;
};
std::vector<Step> steps_of(const std::vector<int64_t>& dims) {
    std::vector<Step> steps;
    int64_t at = 0;
    for (size_t g = 0; g < dims.size(); ++g)
        while (at < dims[g]) {
            const int64_t end = std::min(dims[g], (at / TILE + 1) * TILE);
            steps.push_back({at, end, int(g)});
            at = end;
        }
    return steps;
}

// The column vectors of a chunk, padded as blocks read them.
struct Columns {
    Columns(const Scores& s, int64_t tiles)
        : apart(tiles * TILE), scale(apart * s.dims.size(), 0.0f), bias(apart, NEGATIVE_INFINITY) {
        for (size_t g = 0; g < s.dims.size(); ++g)
            for (int64_t c = 0; c < s.cols; ++c)
                scale[g * apart + c] = s.col_scale ? s.col_scale[g * s.cols_apart + c] : 1.0f;
        for (int64_t c = 0; c < s.cols; ++c) bias[c] = s.bias ? s.bias[c] : 0.0f;
    }
    int64_t apart;
    std::vector<float> scale, bias;
};

// The part of a chunk in a block of rows and a tile of columns.
Block block_of(const Scores& s, const Columns& columns, const float* scores, int64_t row, int rows,
               int64_t tile) {
    const int64_t col = tile * TILE;
    Block b = {};
    b.scores = scores;
    b.prefixes = int(s.dims.size());
    b.rows = rows;
    b.cols = int(std::min<int64_t>(TILE, s.cols - col));
    b.row_scale = s.row_scale ? s.row_scale + row : nullptr;
    b.row_apart = s.rows;
    b.col_scale = columns.scale.data() + col;
    b.col_apart = columns.apart;
    b.bias = columns.bias.data() + col;
    b.target = s.target ? s.target + row : nullptr;
    b.first_col = s.first_col + col;
    b.period = s.period;
    b.exclude_own = s.exclude_own;
    b.own_boost = s.own_boost;
    b.other_boost = s.other_boost;
    b.soft = s.soft ? s.soft + row * s.soft_stride + col : nullptr;
    b.soft_stride = s.soft_stride;
    b.mask = s.mask ? s.mask + row * s.mask_stride + col : nullptr;
    b.mask_stride = s.mask_stride;
    b.sigmoid = s.sigmoid;
    return b;
}

// The blocks of all prefixes, from one walk over the columns of x and w.
// x: [blocks][rows, TILE] `x_apart` apart; w: a vertical tile.
void make_scores(const Kernels& kernels, const std::vector<Step>& steps, const float* x,
                 int64_t x_apart, int rows, const float* w, float* scores) {
    for (const Step& step : steps) {
        const bool first = step.begin == 0;
        const bool opens = !first && (&step)[-1].prefix != step.prefix;
        float* out = scores + step.prefix * ROWS * TILE;
        kernels.product({x + step.begin / TILE * x_apart + step.begin % TILE, TILE, 1, rows,
                         w + step.begin * TILE, step.end - step.begin,
                         first   ? nullptr
                         : opens ? out - ROWS * TILE
                                 : out,
                         out, 0, TILE});
    }
}

// Runs fn(thread's scratch, first row, rows, tile) with the scores of each block of a chunk, tiles
// in order for a group of rows; before(scratch, group) and after(scratch, group) around them.
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

namespace {

// A [G, cols] array as [G, tiles · TILE], padded.
std::vector<float> padded(const float* data, const Scores& s, int64_t apart, float fill) {
    if (!data) return {};
    std::vector<float> out(apart * s.dims.size(), fill);
    for (size_t g = 0; g < s.dims.size(); ++g)
        std::copy_n(data + g * s.cols_apart, s.cols, out.data() + g * apart);
    return out;
}

// Suffix sums of given score gradients, as score_gradients makes them of its own.
void sum_given(const Scores& s, const Given& from, int64_t row, int rows, int64_t tile,
               float* suffix, int64_t suffix_apart, float* bias_sums) {
    const int64_t col = tile * TILE, cols = std::min<int64_t>(TILE, s.cols - col);
    for (int r = 0; r < rows; ++r) {
        float sum[TILE] = {};
        for (int64_t g = int64_t(s.dims.size()) - 1; g >= 0; --g) {
            const float* grad =
                from.grad + g * from.grad_apart + (row + r) * from.grad_stride + col;
            for (int64_t c = 0; c < cols; ++c) sum[c] += grad[c];
            std::memcpy(suffix + g * suffix_apart + r * TILE, sum, sizeof sum);
        }
        if (bias_sums)
            for (int64_t c = 0; c < cols; ++c) bias_sums[c] += sum[c];
    }
}

// A block of columns and the part of it that belongs to one slab.
struct Piece {
    int64_t block;
    int begin, end;
    int prefix;
};
std::vector<std::vector<Piece>> pieces_of(const std::vector<int64_t>& dims) {
    std::vector<std::vector<Piece>> pieces(blocks_of(dims.back(), TILE));
    for (const Step& step : steps_of(dims)) {
        const int64_t block = step.begin / TILE;
        pieces[block].push_back(
            {block, int(step.begin % TILE), int(step.end - block * TILE), step.prefix});
    }
    return pieces;
}

void add_block(const float* block, int rows, const Piece& piece, float* out, int64_t stride) {
    for (int r = 0; r < rows; ++r) {
        float* to = out + r * stride + piece.block * TILE;
        for (int c = piece.begin; c < piece.end; ++c) to[c] += block[r * TILE + c];
    }
}

}  // namespace

void gradients(const Kernels& kernels, const Scores& s, const Given& from, int threads,
               int64_t workspace_bytes, float* dx, int64_t dx_stride, float* dw, int64_t dw_stride,
               float* d_row_scale, float* d_col_scale, float* db) {
    if (!s.rows || !s.cols) return;
    threads = threads_for(s, threads);
    const int64_t G = int64_t(s.dims.size()), tiles = blocks_of(s.cols, TILE);
    const int64_t depth = s.dims.back(), depth_blocks = blocks_of(depth, TILE);
    const Columns columns(s, tiles);
    const std::vector<Step> steps = steps_of(s.dims);
    const std::vector<std::vector<Piece>> pieces = pieces_of(s.dims);
    const std::vector<float> col_max = padded(from.col_max, s, columns.apart, 0.0f);
    const std::vector<float> col_log = padded(from.col_log, s, columns.apart, 0.0f);
    const std::vector<float> d_col = padded(from.d_col, s, columns.apart, 0.0f);

    const bool given = from.grad != nullptr;
    const Buffer tile_w(given ? 0 : tiles * depth * TILE);     // for the scores
    const Buffer block_w(tiles * TILE * depth_blocks * TILE);  // for dx
    for_each(threads, tiles, [&](int64_t t) {
        if (!given) pack_tile(kernels, s, t, tile_w.get() + t * depth * TILE);
        pack_blocks(s.w, t * TILE, std::min(s.cols, (t + 1) * TILE), depth,
                    block_w.get() + t * TILE * TILE, tiles * TILE * TILE);
    });

    const int64_t bytes_a_row = 4 * G * tiles * TILE;
    const int64_t fitting = std::max<int64_t>(1, workspace_bytes / bytes_a_row / ROWS) * ROWS;
    const int64_t step = std::min(blocks_of(s.rows, ROWS) * ROWS, fitting);
    const int64_t plane = tiles * step * TILE;  // of a prefix
    const int64_t segments = blocks_of(step, SEGMENT_ROWS);
    const Buffer x(depth_blocks * step * TILE), suffix(G * plane);
    std::vector<float> row_sums(d_row_scale ? tiles * G * step : 0);
    std::vector<float> col_sums(d_row_scale ? segments * tiles * G * TILE : 0);
    std::vector<double> bias_sums(db ? segments * tiles * TILE : 0);

    for (int64_t begin = 0; begin < s.rows; begin += step) {
        const int64_t count = std::min(step, s.rows - begin);
        const int64_t x_apart = step * TILE, parts = blocks_of(count, SEGMENT_ROWS);
        for_each(threads, blocks_of(count, ROWS), [&](int64_t i) {
            pack_blocks(s.x, begin + i * ROWS, begin + std::min(count, (i + 1) * ROWS), depth,
                        x.get() + i * ROWS * TILE, x_apart);
        });
        std::fill(col_sums.begin(), col_sums.end(), 0.0f);
        std::fill(bias_sums.begin(), bias_sums.end(), 0.0);

        // Scores, their gradients, and T_g = Σ_{h >= g} A_h, [G][tiles][step, TILE].
        Ranges ranges(tiles * parts, 1);
        parallel(threads, [&](int) {
            const Buffer scores(given ? 0 : G * ROWS * TILE);
            for (int64_t unit, last; ranges.next(&unit, &last);) {
                const int64_t t = unit / parts, segment = unit % parts;
                const int64_t end = std::min(count, (segment + 1) * SEGMENT_ROWS);
                for (int64_t row = segment * SEGMENT_ROWS; row < end; row += ROWS) {
                    const int rows = int(std::min<int64_t>(ROWS, end - row));
                    float* out = suffix.get() + (t * step + row) * TILE;
                    float bias_block[TILE] = {};
                    float* bias_to = db ? bias_block : nullptr;
                    const auto add_bias = [&] {
                        double* sums = bias_sums.data() + (segment * tiles + t) * TILE;
                        for (int c = 0; db && c < TILE; ++c) sums[c] += bias_block[c];
                    };
                    if (given) {
                        sum_given(s, from, begin + row, rows, t, out, plane, bias_to);
                        add_bias();
                        continue;
                    }
                    make_scores(kernels, steps, x.get() + row * TILE, x_apart, rows,
                                tile_w.get() + t * depth * TILE, scores.get());
                    ScoreGradients to = {};
                    const int64_t at = begin + row;
                    to.row_max = from.row_max + at;
                    to.row_log = from.row_log + at;
                    to.d_row = from.d_row + at;
                    to.d_hit = from.d_hit ? from.d_hit + at : nullptr;
                    to.d_soft = from.d_soft ? from.d_soft + at : nullptr;
                    to.apart = s.rows;
                    to.total_step = s.soft_stride ? 1 : 0;
                    to.soft_total = from.soft_total + at * to.total_step;
                    if (from.d_col) {
                        to.col_max = col_max.data() + t * TILE;
                        to.col_log = col_log.data() + t * TILE;
                        to.d_col = d_col.data() + t * TILE;
                        to.cols_apart = columns.apart;
                    }
                    to.suffix = out;
                    to.suffix_apart = plane;
                    if (d_row_scale) {
                        to.row_sums = row_sums.data() + t * G * step + row;
                        to.sums_apart = step;
                        to.col_sums = col_sums.data() + (segment * tiles + t) * G * TILE;
                    }
                    to.bias_sums = bias_to;
                    kernels.score_gradients(block_of(s, columns, scores.get(), at, rows, t), to);
                    add_bias();
                }
            }
        });

        // dx += T · w and dw += Tᵀ · x, slab by slab; a unit owns what it adds to.
        const int64_t row_blocks = blocks_of(count, ROWS), dx_units = row_blocks * depth_blocks;
        for_each(threads, dx_units + tiles * depth_blocks, [&](int64_t unit) {
            float block[TILE * TILE];
            const bool of_x = unit < dx_units;
            if (!of_x) unit -= dx_units;
            const int64_t c = unit % depth_blocks, own = unit / depth_blocks;
            const int64_t row = own * ROWS, tile = own * TILE;
            const int rows = of_x ? int(std::min<int64_t>(ROWS, count - row))
                                  : int(std::min<int64_t>(TILE, s.cols - tile));
            for (const Piece& piece : pieces[c]) {
                const float* t = suffix.get() + piece.prefix * plane;
                if (of_x) {
                    for (int64_t i = 0; i < tiles; ++i)
                        kernels.product({t + (i * step + row) * TILE, TILE, 1, rows,
                                         block_w.get() + (c * tiles + i) * TILE * TILE,
                                         std::min<int64_t>(TILE, s.cols - i * TILE),
                                         i ? block : nullptr, block, piece.begin, piece.end});
                    add_block(block, rows, piece, dx + (begin + row) * dx_stride, dx_stride);
                } else {
                    for (int64_t r = 0; r < count; r += TILE)
                        kernels.product({t + (own * step + r) * TILE, 1, TILE, rows,
                                         x.get() + c * x_apart + r * TILE,
                                         std::min<int64_t>(TILE, count - r), r ? block : nullptr,
                                         block, piece.begin, piece.end});
                    add_block(block, rows, piece, dw + tile * dw_stride, dw_stride);
                }
            }
        });

        if (d_row_scale)
            for (int64_t g = 0; g < G; ++g) {
                for (int64_t row = 0; row < count; ++row)
                    for (int64_t t = 0; t < tiles; ++t)
                        d_row_scale[g * s.rows + begin + row] += row_sums[(t * G + g) * step + row];
                for (int64_t c = 0; c < s.cols; ++c)
                    for (int64_t i = 0; i < parts; ++i)
                        d_col_scale[g * s.cols_apart + c] +=
                            col_sums[((i * tiles + c / TILE) * G + g) * TILE + c % TILE];
            }
        if (db)
            for (int64_t c = 0; c < s.cols; ++c) {
                double sum = 0.0;
                for (int64_t i = 0; i < parts; ++i)
                    sum += bias_sums[(i * tiles + c / TILE) * TILE + c % TILE];
                db[c] += float(sum);
            }
    }
}

}  // namespace mrl
