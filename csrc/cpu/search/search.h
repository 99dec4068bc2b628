// Search on the CPU: the funnel, rerank, certified exact search, and the rows that they read.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "cpu/search/metric.h"
#include "cpu/simd/kernels.h"

namespace mrl {

// Statistics of each row, fp32 [statistics, rows of a span]; norms are rounded up.
enum Stat : int {
    PREFIX_NORM,  // norm of the columns that are packed or have codes
    CODE_SCALE,   // the value of a code of 1
    CODE_ERROR,   // norm of the prefix less what its codes stand for
    TAIL_NORM,    // [levels]: norm of the suffix from a level on
    // With a ladder, which has no levels. PREFIX_NORM is the whole row's; CODE_SCALE and CODE_ERROR
    // are of four bits, and these and LOW_ERROR divided by that norm where norms divide.
    LOW_ERROR = TAIL_NORM,  // CODE_ERROR of eight bits
    SIGN_FACTOR,  // [dims], then terms [dims] and, where norms divide, inverses [dims]; see Ladder
};

// Statistics of a tile with a ladder: the greatest of its rows, divided like the rows' own.
enum TileStat : int {
    CODE_NORM,     // norm of the row less the centre, plus CODE_ERROR: at least the codes' norm
    ROUNDED_NORM,  // CODE_NORM plus the row's own norm: what rounding is a share of
    TILE_STATS
};

// Codes of all columns, of which a first stage reads the signs of a prefix or the first four bits,
// and later ones the first four or all eight of listed rows; see codes.h. Let c be the centre, y =
// x − c and p = q − c, both rotated where there are signs. Then S = Σ ±p, by the signs of y,
// estimates ⟨p, y⟩ as S · ‖y‖² / ‖y‖₁, and a score is
//   ⟨q, x⟩ = ⟨q, c⟩ + ⟨p, y⟩ + ⟨c, y⟩  or  −‖q − x‖² = 2⟨p, y⟩ − ‖y‖² − ‖p‖².
// For each prefix of dims a row has a factor, ‖y‖² / ‖y‖₁, and a term: ⟨c, x⟩, or ‖y‖² where
// squares count. Where norms divide, factor and term are divided by ‖x‖, and there is an inverse, 1
// / ‖x‖.
struct Ladder {
    std::vector<int64_t> dims;  // ascending; the last is all columns; none: there are no such codes
    const float* centre;        // [width]; null is 0
    Metric metric;
    const float* signs = nullptr;  // [width] of 1 and −1, see rotate(); null: nothing is rotated
    // Whether a row's score has a term beside ⟨p, y⟩.
    bool has_terms() const { return terms_of(metric).squares > 0.0f || centre; }
    int64_t place(int64_t dim) const {
        return std::find(dims.begin(), dims.end(), dim) - dims.begin();
    }
};

// Consecutive rows of the database.
struct Span {
    int64_t first, rows;
    const float* packed;   // [ceil(rows / TILE), packed_dim, TILE]: columns [0, packed_dim)
    const uint8_t* codes;  // [ceil(rows / TILE), ceil(code_dim / 4), TILE, 4]; see codes.h
    const void* suffix;    // row-major; its column 0 is column packed_dim
    int64_t stride;        // of the suffix, in elements
    const float* stats;    // [Stat, stats_stride]
    int64_t stats_stride;
    const int64_t* ids;  // [rows], named in results; null: the row's number
    const uint8_t *signs = nullptr, *nibbles = nullptr, *lows = nullptr;  // of a ladder
    const float* tile_stats = nullptr;                                    // [tiles, TILE_STATS]
    int64_t tiles() const { return (rows + TILE - 1) / TILE; }
};

struct Rows {
    std::vector<Span> spans;  // in order
    int64_t packed_dim, code_dim;
    DType dtype;                  // of the suffix; with I8, packed_dim is 0
    std::vector<int64_t> levels;  // columns from which TAIL_NORM sums; the first ends the prefix
    Ladder ladder = {};
    int64_t width = 0;  // columns that the statistics are of; 0: those that are searched

    // The rows that may be found; without a mask all of them.
    const uint64_t* mask = nullptr;           // live mask: [tiles of the spans], bit r is row r
    std::vector<int64_t> tiles = {};          // numbers of the tiles that hold such rows
    int64_t masked = 0;                       // the number of such rows
    std::vector<int64_t> gathered_rows = {};  // all of them where they are few, else empty

    int64_t count() const { return spans.empty() ? 0 : spans.back().first + spans.back().rows; }
    int64_t eligible() const { return mask ? masked : count(); }
    // The same rows with another mask, which must outlive them.
    Rows restricted(const uint64_t* to) const;
    // The same rows, named in results by their numbers.
    Rows numbered() const;
    void gather();        // fills gathered_rows
    void check() const {  // keys have 32 bits for the row
        if (count() > 0xffffffffll) throw std::length_error("more than 2^32 - 1 rows");
    }
};

// Bit r of word r / 64 is whether flags[r] is anything but 0.
void pack_flags(const uint8_t* flags, int64_t count, uint64_t* words);

struct Queries {
    const float* data;  // [n, stride]
    int64_t n;
    int64_t stride;
};

struct Stage {
    int64_t dim, keep;
    // Of a ladder's codes that rank: first 1 or 4, later 4 or 8, and more than the stage before; 0:
    // columns rank. GRAPH: a graph finds rows, first, and dim is its beam.
    int64_t bits = 0;
    static constexpr int64_t GRAPH = -1;
};

// Where a search writes the `keep` best of each query: [queries, keep], best first; id −1 and score
// −inf where there are fewer.
struct Results {
    float* scores;
    int64_t* ids;
    double* scores64 = nullptr;  // of an exact search, which ranks by them; null: nowhere
};

struct Neighbour {
    float score;
    int64_t id;
    double score64;  // that it ranks by
};

enum class Status { OK, NOT_FINITE, OVERFLOW_, QUERY_NOT_FINITE };

struct Graph;

// Runs the stages; the results are the last one's. Where there are codes, a first stage at code_dim
// that is not the last ranks by them.
Status search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
              const std::vector<Stage>& stages, const Results& results,
              const Graph* graph = nullptr);

// Rows to choose among: [queries, count], −1 is none.
struct Candidates {
    const int64_t* rows;
    int64_t count;
};

// The best of each query's candidates by their first columns; packed_dim must be 0.
Status rerank(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
              const Candidates& candidates, Stage stage, const Results& results);

// How many columns of a scan cost what reranking one row for a first θ does: where there are few
// rows, exact search makes no θ and no bounds. Tests set it to 0, so that few rows are bounded too.
extern std::atomic<int64_t> seed_columns;

// The best by `dim` columns, ranked by scores summed in fp64. touched[q] is the number of times
// that rows were read beyond their prefix.
Status exact_search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                    Stage stage, const Results& results, int64_t* touched);

// Every row whose score by `dim` columns, rounded to fp32, is at least `threshold`.
Status range_search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                    int64_t dim, double threshold, std::vector<std::vector<Neighbour>>* found);

// Vectors to store, row-major.
struct NewRows {
    const void* data;  // [n, stride]
    DType dtype;
    int64_t stride;  // in elements
    int64_t n, dim;
};

// The arrays of a span to be filled, as in Span; any may be null.
struct SpanArrays {
    float* packed;
    uint8_t* codes;
    float* stats;
    int64_t stats_stride;
    void* suffix;  // of the layout's dtype
    int64_t suffix_stride;
    uint8_t *signs = nullptr, *nibbles = nullptr, *lows = nullptr;  // of a ladder
    float* tile_stats = nullptr;
};

// Writes rows [begin, begin + n) of a span: columns [0, packed_dim) to tiles, the others to the
// suffix; the codes of columns [0, code_dim) and the statistics. `layout` need have no spans. The
// vectors are of its dtype, or F32 where that is I8: then they are rounded to codes, and the rest
// is of what these stand for.
Status store(const Run& run, const Rows& layout, const NewRows& vectors, int64_t begin,
             const SpanArrays& to);

}  // namespace mrl
