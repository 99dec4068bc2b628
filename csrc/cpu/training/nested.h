// Nested scores S_g = x[:, :d_g] · wᵀ[:d_g, :], a block at a time, folded into a loss or turned
// into its gradients.
//
// Scores live only as blocks of ROWS × TILE that stay in cache: each slab's product is added to the
// block of the prefix before; then the blocks of all prefixes are folded into row and column
// statistics, or turned into gradients. Every product, in the backward too, is made by one kernel:
// out = in + a · b with b of TILE columns.
#pragma once

#include <vector>

#include "cpu/simd/kernels.h"

namespace mrl {

constexpr int ROWS = 48;                // rows of a block: whole strips of 6
constexpr int GROUP_ROWS = 2 * ROWS;    // rows that share a tile of columns while it is in L2
constexpr int MAX_WIDTH = 16;           // lanes of the widest vector
constexpr float LOWEST_SCORE = -1e30f;  // a maximum below every score, and finite

// out = in + a · b over columns [begin, end), which may be widened to whole vectors. The product is
// summed on its own first: a long sum of short ones keeps more digits.
struct Product {
    const float* a;  // element (r, k) at r·a_row + k·a_step
    int64_t a_row, a_step;
    int rows;
    const float* b;  // [depth, TILE]
    int64_t depth;
    const float* in;  // [rows, TILE], may be out; null is zeros
    float* out;
    int begin, end;
};

// A block of nested scores and how a loss reads them:
// z = row_scale·col_scale·S + bias; y = z·boost, −inf where excluded.
struct ScoreBlock {
    const float* scores;  // [prefixes, ROWS, TILE]
    int prefixes, rows, cols;
    const float* row_scale;  // [prefixes, rows], prefixes row_apart apart; null is 1
    int64_t row_apart;
    const float* col_scale;  // [prefixes, TILE], likewise; padded with 0
    int64_t col_apart;
    const float* bias;      // [TILE], padded with −inf: a score past the last column counts for 0
    const int64_t* target;  // [rows] or null: the column of a row's positive
    int64_t first_col;      // of this block
    int64_t period;         // a row's own columns are those equal to its target modulo this
    bool exclude_own;
    float own_boost, other_boost;  // factors of own columns but the target, of all others
    const float* soft;             // [rows, cols] or null; stride 0 serves every row
    int64_t soft_stride;
    const uint8_t* mask;  // [rows, cols] or null; not 0 is excluded
    int64_t mask_stride;
    bool sigmoid;  // Σ softplus instead of log Σ exp
};

// Running statistics of a block's rows. Those with MAX_WIDTH are kept lane by lane and folded at
// the end. Σ exp is relative to `ref`, the row's maximum so far: the largest score counts
// exactly 1.
struct Statistics {
    float* ref;      // [prefixes, ROWS]
    float* top;      // [prefixes, ROWS, MAX_WIDTH]
    float* sum;      // [prefixes, ROWS, MAX_WIDTH]
    int32_t* best;   // [prefixes, ROWS, MAX_WIDTH]: first column of top's vector; or null
    double* soft;    // [prefixes, ROWS]: Σ soft·(y − ref)
    double* weight;  // [ROWS]: Σ soft
    float* hit;      // [prefixes, rows], hit_apart apart: y at the target; or null
    int64_t hit_apart;
    float* col_ref;  // [prefixes, TILE], stats_apart apart; or null, as the next two
    float* col_top;
    float* col_sum;
    int64_t stats_apart;
};

// Turns gradients of the log-sums, of the targets' and of the soft targets' log-probabilities into
// the scores' gradients A_g, and sums these over the prefixes from each one on.
struct ScoreGradients {
    const float* row_max;  // [prefixes, rows], prefixes `apart` apart, as the next four
    const float* row_log;
    const float* d_row;
    const float* d_hit;   // or null
    const float* d_soft;  // or null
    int64_t apart;
    const float* soft_total;  // [rows] with a step of 0 or 1: Σ_j soft
    int64_t total_step;
    const float* col_max;  // [prefixes, TILE], cols_apart apart; or null, as the next two
    const float* col_log;
    const float* d_col;
    int64_t cols_apart;
    float* suffix;  // [prefixes, rows, TILE]: Σ_{h >= g} A_h
    int64_t suffix_apart;
    float* row_sums;  // [prefixes, rows], sums_apart apart: Σ_j a·col_scale·S; or null
    int64_t sums_apart;
    float* col_sums;   // [prefixes, TILE]: Σ_i a·row_scale·S; or null
    float* bias_sums;  // [TILE]: Σ_g Σ_i a; or null
};

struct Matrix {
    const float* data;
    int64_t stride;
};

// The scores of one chunk of columns, rows × cols of them, as in ScoreBlock. Pointers are at the
// chunk's first column; row arrays are [G, rows], column arrays [G, cols] with prefixes
// `cols_apart` apart.
struct Scores {
    Matrix x, w;
    int64_t rows, cols;
    std::vector<int64_t> dims;
    const float *bias, *row_scale, *col_scale;
    int64_t cols_apart;
    const int64_t* target;
    int64_t first_col, period;
    bool exclude_own;
    float own_boost, other_boost;
    const float* soft;
    int64_t soft_stride;
    const uint8_t* mask;
    int64_t mask_stride;
    bool sigmoid;
};

// The results of a fold; row arrays [G, rows], column arrays [G, cols] like those of Scores.
struct FoldOutput {
    float* row_max;    // continued over chunks of columns, as the next three
    double* row_sum;   // Σ exp(y − row_max), with sigmoid Σ softplus(y)
    int64_t* labels;   // the first column of the row's maximum; or null
    double* soft_sum;  // Σ soft·y; or null
    float* hit;        // y at the target, written by the chunk that holds it; or null
    float* col_max;    // of this chunk's rows; or null, as the next
    double* col_sum;
};
void fold(const Run& run, const Scores& scores, const FoldOutput& out);

// out[g, i, j] = S_g + bias; prefixes out_apart, rows out_stride apart.
void store_scores(const Run& run, const Scores& scores, float* out, int64_t out_apart,
                  int64_t out_stride);

// The inputs of a backward: statistics and their gradients, or the scores' gradients themselves.
struct Given {
    const float *row_max, *row_log, *d_row, *d_hit, *d_soft, *col_max, *col_log, *d_col;
    const float* soft_total;  // Σ_j soft of each row, or of the one that serves all
    const float* grad;        // [G, rows, cols]: gradients of the scores themselves; or null
    int64_t grad_apart, grad_stride;
};

// The arrays that a backward adds to.
struct GradientOutput {
    float* dx;  // [rows, dims.back()]
    int64_t dx_stride;
    float* dw;  // [cols, dims.back()]
    int64_t dw_stride;
    float* d_row_scale;  // [G, rows]; or null, as the next two
    float* d_col_scale;  // [G, cols]
    float* db;           // [cols]
};

// Holds at most workspace_bytes of score gradients, or those of ROWS rows.
void gradients(const Run& run, const Scores& scores, const Given& from, int64_t workspace_bytes,
               const GradientOutput& out);

}  // namespace mrl
