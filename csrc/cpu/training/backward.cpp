#include <cstring>

#include "cpu/training/blocks.h"

namespace mrl {
namespace {

constexpr int64_t SEGMENT_ROWS = 5 * ROWS;  // rows of a unit of work

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
                for (int64_t t = 0; t < tiles; ++t)
                    for (int64_t row = 0; row < count; ++row)
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
