// The backward: gradients of nested scores, and their products with the inputs.
#include <cstring>

#include "cpu/training/blocks.h"

namespace mrl {
namespace {

constexpr int64_t SEGMENT_ROWS = 5 * ROWS;  // a unit of work is these rows of a tile of columns

// A [G, cols] array as [G, tiles · TILE], padded with 0.
std::vector<float> padded(const float* data, const Scores& s, int64_t apart) {
    if (!data) return {};
    std::vector<float> out(apart * s.dims.size(), 0.0f);
    for (size_t g = 0; g < s.dims.size(); ++g)
        std::copy_n(data + g * s.cols_apart, s.cols, out.data() + g * apart);
    return out;
}

// Suffix sums of given score gradients, as score_gradients makes them of its own; `col` is the
// first of a tile's columns.
void sum_given(const Scores& s, const Given& from, int64_t row, int rows, int64_t col,
               const ScoreGradients& to) {
    const int64_t cols = std::min<int64_t>(TILE, s.cols - col);
    for (int r = 0; r < rows; ++r) {
        float sum[TILE] = {};
        for (int64_t g = int64_t(s.dims.size()) - 1; g >= 0; --g) {
            const float* grad =
                from.grad + g * from.grad_apart + (row + r) * from.grad_stride + col;
            for (int64_t c = 0; c < cols; ++c) sum[c] += grad[c];
            std::memcpy(to.suffix + g * to.suffix_apart + r * TILE, sum, sizeof sum);
        }
        if (to.bias_sums)
            for (int64_t c = 0; c < cols; ++c) to.bias_sums[c] += sum[c];
    }
}

// The part of a block of TILE columns that belongs to one slab.
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

// The backward of one chunk of columns, for as many rows at a time as the workspace can hold the
// score gradients of.
class Backward {
  public:
    Backward(const Run& run, const Scores& s, const Given& from, int64_t workspace_bytes,
             const GradientOutput& out);
    void run();

  private:
    void pack_columns();
    void pack_rows();
    void make_suffix_sums();
    void gradients_of(int64_t tile, int64_t segment, float* scores);
    ScoreGradients destination(int64_t row, int64_t tile, int64_t segment);
    void multiply();
    void multiply_x(const Piece& piece, int64_t block);
    void multiply_w(const Piece& piece, int64_t tile);
    void add_scale_sums();
    void add_bias_sums();

    const Kernels& kernels_;
    const Scores& s_;
    const Given& from_;
    const GradientOutput& out_;
    const int threads_;
    const bool given_;  // the scores' gradients are given; scores are not made
    const int64_t G_, tiles_, depth_, depth_blocks_;
    const Columns columns_;
    const std::vector<Step> steps_;
    const std::vector<std::vector<Piece>> pieces_;
    const std::vector<float> col_max_, col_log_, d_col_;  // [G, tiles · TILE]
    const Buffer tile_w_;                                 // w for the scores: [tiles][depth, TILE]
    const Buffer block_w_;               // w for dx: [blocks of its columns][tiles · TILE, TILE]
    const int64_t capacity_, segments_;  // the most rows held at a time
    const int64_t plane_;                // elements of suffix_ a prefix
    const Buffer x_;                     // [blocks of its columns][capacity, TILE]
    const Buffer suffix_;                // T_g = Σ_{h >= g} A_h, [G][tiles][capacity, TILE]
    std::vector<float> row_sums_;        // [tiles][G, capacity]
    std::vector<float> col_sums_;        // [segments][tiles][G, TILE]
    std::vector<double> bias_sums_;      // [segments][tiles, TILE]
    int64_t begin_ = 0, count_ = 0;      // rows held now
};

int64_t capacity_of(const Scores& s, int64_t workspace_bytes) {
    const int64_t bytes_a_row = 4 * int64_t(s.dims.size()) * blocks_of(s.cols, TILE) * TILE;
    const int64_t fitting = std::max<int64_t>(1, workspace_bytes / bytes_a_row / ROWS) * ROWS;
    return std::min(blocks_of(s.rows, ROWS) * ROWS, fitting);
}

Backward::Backward(const Run& run, const Scores& s, const Given& from, int64_t workspace_bytes,
                   const GradientOutput& out)
    : kernels_(run.kernels),
      s_(s),
      from_(from),
      out_(out),
      threads_(threads_for(s, run.threads)),
      given_(from.grad != nullptr),
      G_(int64_t(s.dims.size())),
      tiles_(blocks_of(s.cols, TILE)),
      depth_(s.dims.back()),
      depth_blocks_(blocks_of(depth_, TILE)),
      columns_(s, tiles_),
      steps_(steps_of(s.dims)),
      pieces_(pieces_of(s.dims)),
      col_max_(padded(from.col_max, s, columns_.apart)),
      col_log_(padded(from.col_log, s, columns_.apart)),
      d_col_(padded(from.d_col, s, columns_.apart)),
      tile_w_(given_ ? 0 : tiles_ * depth_ * TILE),
      block_w_(tiles_ * TILE * depth_blocks_ * TILE),
      capacity_(capacity_of(s, workspace_bytes)),
      segments_(blocks_of(capacity_, SEGMENT_ROWS)),
      plane_(tiles_ * capacity_ * TILE),
      x_(depth_blocks_ * capacity_ * TILE),
      suffix_(G_ * plane_),
      row_sums_(out.d_row_scale ? tiles_ * G_ * capacity_ : 0),
      col_sums_(out.d_row_scale ? segments_ * tiles_ * G_ * TILE : 0),
      bias_sums_(out.db ? segments_ * tiles_ * TILE : 0) {}

void Backward::run() {
    pack_columns();
    for (begin_ = 0; begin_ < s_.rows; begin_ += capacity_) {
        count_ = std::min(capacity_, s_.rows - begin_);
        pack_rows();
        std::fill(col_sums_.begin(), col_sums_.end(), 0.0f);
        std::fill(bias_sums_.begin(), bias_sums_.end(), 0.0);
        make_suffix_sums();
        multiply();
        if (out_.d_row_scale) add_scale_sums();
        if (out_.db) add_bias_sums();
    }
}

void Backward::pack_columns() {
    for_each(threads_, tiles_, [&](int64_t t) {
        if (!given_) pack_tile(kernels_, s_, t, tile_w_.get() + t * depth_ * TILE);
        pack_blocks(s_.w, t * TILE, std::min(s_.cols, (t + 1) * TILE), depth_,
                    block_w_.get() + t * TILE * TILE, tiles_ * TILE * TILE);
    });
}

void Backward::pack_rows() {
    for_each(threads_, blocks_of(count_, ROWS), [&](int64_t i) {
        pack_blocks(s_.x, begin_ + i * ROWS, begin_ + std::min(count_, (i + 1) * ROWS), depth_,
                    x_.get() + i * ROWS * TILE, capacity_ * TILE);
    });
}

// Scores, their gradients, and the sums of these over the prefixes from each one on.
void Backward::make_suffix_sums() {
    const int64_t parts = blocks_of(count_, SEGMENT_ROWS);
    Ranges ranges(tiles_ * parts, 1);
    parallel(threads_, [&](int) {
        const Buffer scores(given_ ? 0 : G_ * ROWS * TILE);
        for (int64_t unit, last; ranges.next(&unit, &last);)
            gradients_of(unit / parts, unit % parts, scores.get());
    });
}

void Backward::gradients_of(int64_t tile, int64_t segment, float* scores) {
    const int64_t end = std::min(count_, (segment + 1) * SEGMENT_ROWS);
    for (int64_t row = segment * SEGMENT_ROWS; row < end; row += ROWS) {
        const int rows = int(std::min<int64_t>(ROWS, end - row));
        ScoreGradients to = destination(row, tile, segment);
        float bias_block[TILE] = {};
        if (out_.db) to.bias_sums = bias_block;
        if (given_) {
            sum_given(s_, from_, begin_ + row, rows, tile * TILE, to);
        } else {
            make_scores(kernels_, steps_, x_.get() + row * TILE, capacity_ * TILE, rows,
                        tile_w_.get() + tile * depth_ * TILE, scores);
            kernels_.score_gradients(block_of(s_, columns_, scores, begin_ + row, rows, tile), to);
        }
        double* sums = bias_sums_.data() + (segment * tiles_ + tile) * TILE;
        for (int c = 0; out_.db && c < TILE; ++c) sums[c] += bias_block[c];
    }
}

// What score_gradients reads and writes for a block of rows; `row` counts from the first row held.
ScoreGradients Backward::destination(int64_t row, int64_t tile, int64_t segment) {
    ScoreGradients to = {};
    to.suffix = suffix_.get() + (tile * capacity_ + row) * TILE;
    to.suffix_apart = plane_;
    if (given_) return to;
    const int64_t at = begin_ + row;
    to.row_max = from_.row_max + at;
    to.row_log = from_.row_log + at;
    to.d_row = from_.d_row + at;
    to.d_hit = from_.d_hit ? from_.d_hit + at : nullptr;
    to.d_soft = from_.d_soft ? from_.d_soft + at : nullptr;
    to.apart = s_.rows;
    to.total_step = s_.soft_stride ? 1 : 0;
    to.soft_total = from_.soft_total + at * to.total_step;
    if (from_.d_col) {
        to.col_max = col_max_.data() + tile * TILE;
        to.col_log = col_log_.data() + tile * TILE;
        to.d_col = d_col_.data() + tile * TILE;
        to.cols_apart = columns_.apart;
    }
    if (out_.d_row_scale) {
        to.row_sums = row_sums_.data() + tile * G_ * capacity_ + row;
        to.sums_apart = capacity_;
        to.col_sums = col_sums_.data() + (segment * tiles_ + tile) * G_ * TILE;
    }
    return to;
}

// dx += T · w and dw += Tᵀ · x, slab by slab; no two units add to the same element.
void Backward::multiply() {
    const int64_t of_x = blocks_of(count_, ROWS) * depth_blocks_;
    for_each(threads_, of_x + tiles_ * depth_blocks_, [&](int64_t unit) {
        const bool is_x = unit < of_x;
        if (!is_x) unit -= of_x;
        for (const Piece& piece : pieces_[unit % depth_blocks_]) {
            if (is_x)
                multiply_x(piece, unit / depth_blocks_);
            else
                multiply_w(piece, unit / depth_blocks_);
        }
    });
}

void Backward::multiply_x(const Piece& piece, int64_t block) {
    float sum[ROWS * TILE];
    const int64_t row = block * ROWS;
    const int rows = int(std::min<int64_t>(ROWS, count_ - row));
    const float* t = suffix_.get() + piece.prefix * plane_ + row * TILE;
    const float* w = block_w_.get() + piece.block * tiles_ * TILE * TILE;
    for (int64_t i = 0; i < tiles_; ++i, t += capacity_ * TILE, w += TILE * TILE)
        kernels_.product({t, TILE, 1, rows, w, std::min<int64_t>(TILE, s_.cols - i * TILE),
                          i ? sum : nullptr, sum, piece.begin, piece.end});
    add_block(sum, rows, piece, out_.dx + (begin_ + row) * out_.dx_stride, out_.dx_stride);
}

void Backward::multiply_w(const Piece& piece, int64_t tile) {
    float sum[TILE * TILE];
    const int rows = int(std::min<int64_t>(TILE, s_.cols - tile * TILE));
    const float* t = suffix_.get() + piece.prefix * plane_ + tile * capacity_ * TILE;
    const float* x = x_.get() + piece.block * capacity_ * TILE;
    for (int64_t r = 0; r < count_; r += TILE, t += TILE * TILE, x += TILE * TILE)
        kernels_.product({t, 1, TILE, rows, x, std::min<int64_t>(TILE, count_ - r),
                          r ? sum : nullptr, sum, piece.begin, piece.end});
    add_block(sum, rows, piece, out_.dw + tile * TILE * out_.dw_stride, out_.dw_stride);
}

void Backward::add_scale_sums() {
    const int64_t parts = blocks_of(count_, SEGMENT_ROWS);
    for (int64_t g = 0; g < G_; ++g) {
        for (int64_t t = 0; t < tiles_; ++t)
            for (int64_t row = 0; row < count_; ++row)
                out_.d_row_scale[g * s_.rows + begin_ + row] +=
                    row_sums_[(t * G_ + g) * capacity_ + row];
        for (int64_t c = 0; c < s_.cols; ++c)
            for (int64_t i = 0; i < parts; ++i)
                out_.d_col_scale[g * s_.cols_apart + c] +=
                    col_sums_[((i * tiles_ + c / TILE) * G_ + g) * TILE + c % TILE];
    }
}

void Backward::add_bias_sums() {
    const int64_t parts = blocks_of(count_, SEGMENT_ROWS);
    for (int64_t c = 0; c < s_.cols; ++c) {
        double sum = 0.0;
        for (int64_t i = 0; i < parts; ++i)
            sum += bias_sums_[(i * tiles_ + c / TILE) * TILE + c % TILE];
        out_.db[c] += float(sum);
    }
}

}  // namespace

void gradients(const Run& run, const Scores& s, const Given& from, int64_t workspace_bytes,
               const GradientOutput& out) {
    if (s.rows && s.cols) Backward(run, s, from, workspace_bytes, out).run();
}

}  // namespace mrl
