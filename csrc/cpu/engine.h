// Prefix dot products on the CPU: tiles of 64 rows side by side, one fused multiply-add a column
// and pair.
//
// The canonical score of a pair is one chain of multiply-adds over the columns in their order, so a
// partial score can be carried from one prefix to the next, and no blocking, batching or threading
// can change a bit of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mrl {

constexpr int TILE = 64;      // rows of a tile
constexpr int MAX_GROUP = 6;  // queries scored together

enum class DType : int { F32, F16, BF16 };
enum class Metric : int { IP, COSINE, L2 };

// The database. Columns [0, packed_dim) lie in vertical tiles, the others row-major in `tail`.
struct Rows {
    const float* packed;  // [ceil(n / TILE), packed_dim, TILE]
    int64_t packed_dim;
    const void* tail;  // tail column 0 is column packed_dim
    DType dtype;
    int64_t stride;  // of the tail, in elements
    int64_t n;
};

struct Queries {
    const float* data;  // [n, stride]
    int64_t n;
    int64_t stride;
};

// A kept row. `key` orders by (score descending, row ascending) when sorted descending; 0 is no
// row.
struct Entry {
    uint64_t key;
    float partial;  // the chain so far, to be carried to a longer prefix
    float sqnorm;   // of the row's prefix; cosine only
};

// Always inlined: a shared copy could have been compiled for another processor.
[[gnu::always_inline]] inline uint64_t make_key(float score, int64_t row) {
    const float plain = score + 0.0f;  // −0 becomes +0
    int32_t bits;
    __builtin_memcpy(&bits, &plain, sizeof bits);
    uint32_t ordered = uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
    if (score != score) ordered = 0xffffffffu;  // NaN sorts first and is reported
    return uint64_t(ordered) << 32 | (0xffffffffu - uint32_t(row));
}

// The best rows a thread has seen of one query: at most `capacity` entries, cut to the k best when
// full.
struct TopK {
    Entry* entries;
    int64_t count, capacity, k;
};
// Cuts to the k best; returns the k-th score: no later row of the same thread with a score <= it
// can matter.
float shrink(TopK& topk);

struct Segment {
    const float* tile;  // [cols, TILE]
    int64_t cols;
};

// One tile against one group of queries.
struct Scan {
    Segment segments[2];
    const float* panel;        // [cols, group]
    const float* query_scale;  // [group], inverse norms; cosine only
    const float* row_scale;    // [TILE], inverse norms; cosine only
    const float* row_sqnorm;   // [TILE]; cosine only
    int64_t first_row;
    int rows;           // of the tile, <= TILE
    TopK* topk;         // [group]
    float* thresholds;  // [group]
};

struct Product;
struct Block;
struct Statistics;
struct ScoreGradients;

// What is compiled once an instruction set.
struct Kernels {
    const char* name;
    int width;  // lanes of a vector
    // tile[c][r] = rows[r][c], lanes >= n are 0; false if a value is not finite.
    bool (*pack)(const void* const* rows, DType dtype, int n, int64_t cols, float* tile);
    // sums[r] continues Σ_c tile[c][r]².
    void (*sqnorms)(Segment segment, float* sums);
    // sums[r] continues the chain of one query with tile's rows.
    void (*advance)(Metric metric, Segment segment, const float* query, float* sums);
    void (*scan[3][MAX_GROUP])(const Scan&);  // [metric][group - 1]
    // See nested.h.
    void (*product)(const Product&);
    void (*fold_block)(const Block&, const Statistics&);
    void (*score_gradients)(const Block&, const ScoreGradients&);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();  // null, as the next, where it was not compiled
const Kernels* avx512_kernels();

// What this processor runs, best first.
std::vector<const Kernels*> available_kernels();

struct Stage {
    int64_t dim, keep;
};

enum class Status { OK, NOT_FINITE, OVERFLOW_ };

// Runs the stages; the last stage's keep entries a query, best first, to scores and ids [queries.n,
// keep].
Status search(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& stages, int threads, float* scores, int64_t* ids);

// The k best of each query's candidates [queries.n, count] by their first `dim` columns; packed_dim
// must be 0.
Status rerank(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
              const int64_t* candidates, int64_t count, int64_t dim, int64_t k, int threads,
              float* scores, int64_t* ids);

// A row-major matrix [n, cols] into vertical tiles [ceil(n / TILE), cols, TILE].
Status pack_rows(const Kernels& kernels, const void* data, DType dtype, int64_t stride, int64_t n,
                 int64_t cols, int threads, float* tiles);

}  // namespace mrl
