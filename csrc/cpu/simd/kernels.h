// The kernels and their arguments: prefix dot products of queries with tiles of 64 rows side by
// side, one fused multiply-add a column and pair.
//
// The canonical score of a pair is one chain of multiply-adds over the columns in their order, so a
// partial score can be carried from one prefix to the next, and no blocking, batching or threading
// can change a bit of it. Scores of int8 codes are sums of integers: exact in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace mrl {

constexpr int TILE = 64;      // rows of a tile
constexpr int MAX_GROUP = 6;  // queries scored together
constexpr int TERMS = 4;      // that a score may have besides its sum, at most; see Scan

// I8 are codes: the row begins with an fp32 scale, and a code times it, in fp32, is the value.
enum class DType : int { F32, F16, BF16, I8 };
// What a scan sums, in the order of the names: Σ q·x; −Σ (q − x)²; Σ code·code of 8 bits; Σ ±q by
// signs; Σ code·code of 4 bits. See codes.h for the last three.
enum class Source : int { PRODUCT, DIFFERENCE, CODES, SIGNS, NIBBLES };
constexpr int SOURCES = 5;
constexpr bool of_codes(Source source) { return int(source) >= int(Source::CODES); }

constexpr int64_t SIGN_TABLES = 32, NIBBLE_BYTES = 8;  // bytes of a query for eight columns

// A kept row. Keys sorted descending are scores descending, then rows ascending; key 0 is no row.
struct Entry {
    uint64_t key;
    float partial;  // the chain so far, which later stages continue
    float sqnorm;   // Σ x² of the row so far, where norms divide
};

// These functions are always inlined: a shared copy could have been compiled for another processor.
#define MRL_INLINE [[gnu::always_inline]] inline

MRL_INLINE uint64_t make_key(float score, int64_t row) {
    const float plain = score + 0.0f;  // −0 becomes +0
    int32_t bits;
    __builtin_memcpy(&bits, &plain, sizeof bits);
    uint32_t ordered = uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
    if (score != score) ordered = 0xffffffffu;  // NaN sorts first and is reported
    return uint64_t(ordered) << 32 | (0xffffffffu - uint32_t(row));
}

struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};
struct I8 {
    int8_t code;
};
MRL_INLINE float widen(const float* x) { return *x; }
MRL_INLINE float widen(const I8* x) { return float(x->code); }  // without the row's scale
MRL_INLINE float widen(const BF16* x) {
    const uint32_t bits = uint32_t(x->bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
MRL_INLINE float widen(const F16* x) {
    const uint32_t h = x->bits, sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31,
                   mantissa = h & 1023;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa · 2^-24
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    }
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// Calls fn with a null pointer to the element type of a dtype: the one list of element types.
template <class Fn>
MRL_INLINE auto with_element(DType dtype, const Fn& fn) {
    switch (dtype) {
        case DType::F16:
            return fn(static_cast<const F16*>(nullptr));
        case DType::BF16:
            return fn(static_cast<const BF16*>(nullptr));
        case DType::I8:
            return fn(static_cast<const I8*>(nullptr));
        default:
            return fn(static_cast<const float*>(nullptr));
    }
}
inline int64_t element_size(DType dtype) {
    return with_element(dtype, [](auto* type) { return int64_t(sizeof *type); });
}

constexpr int64_t SCALE_BYTES = 4;  // that a row of I8 begins with
inline int64_t row_header(DType dtype) { return dtype == DType::I8 ? SCALE_BYTES : 0; }

// Some columns of a row-major row.
struct RowColumns {
    const void* at;     // the first of them
    const void* scale;  // of I8: the row's, of any alignment
};
template <class T>
constexpr bool SCALED = std::is_same_v<T, I8>;
template <class T>
MRL_INLINE float scale_of(const RowColumns& row) {
    float scale = 1.0f;
    if constexpr (SCALED<T>) __builtin_memcpy(&scale, row.scale, sizeof scale);
    return scale;
}

// Prefetches some rows, each from its first line to its last: memory is twice as fast in this
// order.
template <int COUNT>
struct Prefetch {
    const RowColumns* rows;  // [COUNT]; null: none
    int64_t row_bytes;
    int row = 0;
    int64_t byte = 0;
    MRL_INLINE void lines(int count) {
        for (; rows && count > 0 && row < COUNT; --count) {
            __builtin_prefetch(static_cast<const char*>(rows[row].at) + byte);
            byte += 64;
            if (byte >= row_bytes) byte = 0, ++row;
        }
    }
};

// Memory to prefetch during a scan, a few lines a column: a burst would wait for memory.
struct Ahead {
    const char *at, *end;
    int64_t lines;  // a column
    MRL_INLINE void prefetch() {
        for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at);
    }
};

// The best rows that a thread has seen for one query: at most `capacity` entries, cut to the k best
// when full.
struct TopK {
    Entry* entries;
    int64_t count, capacity, k;
};
// Cuts to the k best and returns the k-th score. A later row of the same thread must beat it: with
// an equal score it comes after.
float shrink(TopK& topk);

struct Segment {
    const float* tile;  // [cols, TILE]
    int64_t cols;
};

// One tile against one group of queries. A score is
// sum · row_scale · query_scale + base + Σ_j term_factors[j] · term_values[j].
struct Scan {
    Segment segments[2];       // fp32 columns
    const uint8_t* codes;      // [steps, TILE, bytes of a step]
    int64_t steps;             // groups of four columns of CODES, of eight of SIGNS and NIBBLES
    const void* panel;         // [cols, group] fp32; of codes [steps, group, bytes of a step]
    const int32_t* offsets;    // [group], added to sums of CODES: −128 · Σ of the query's codes
    const float* shifts;       // [group], added to sums of SIGNS and NIBBLES
    const float* rest;         // [group, TILE], added to sums of columns; null: 0
    const float* row_scale;    // [TILE]; null: scores are the bare sums
    const float* query_scale;  // [group]
    const float* bases;        // [group]; null: 0
    const float* row_sqnorm;   // [TILE], kept in the entries
    int terms;                 // how many there are
    const float* term_values[TERMS];  // [TILE] each
    const float* term_factors;        // [terms, group]
    Ahead ahead;
    int64_t first_row;
    int rows;           // of the tile, <= TILE
    uint64_t wanted;    // bit r: row r may be kept
    TopK* topk;         // [group]
    float* thresholds;  // [group]; a row is dropped where its score is <= this
};

// Row-major rows against some queries, summed in no particular order of columns.
struct RowSums {
    const float* queries;  // [count, stride]
    int64_t stride;
    int count;
    const RowColumns* rows;   // [n]
    const RowColumns* ahead;  // [n], rows to prefetch meanwhile; null: none
    int n;                    // at most TILE where there are more queries than one
    bool cached;              // the rows lie in the processor's caches, most likely
    DType dtype;
    int64_t cols;
    float* sums;     // [count, TILE], continued: Σ q·x or −Σ (q − x)²
    float* squares;  // [n], continued: Σ x²
};

// The fp64 Σ q·x is the sum of eight chains, each over every eighth column. Σ (q − x)² is one
// chain.
constexpr int64_t chains_of(Source source) { return source == Source::DIFFERENCE ? 1 : 8; }

// Sums over the columns of a row x of a ladder, where y is the row less the centre c.
struct PrefixSums {
    double square, beside, along, of_centre;  // Σ x², Σ y², Σ |y|, Σ c·x
    float largest;                            // of |y|
};
struct RowToCode {
    const float* y;        // [steps · 8]; 0 from `cols` on
    int64_t cols, steps;   // of eight columns
    float inverse, scale;  // eight bits of a step of 1; the value of a step of four bits
};
struct RowCodes {
    int32_t* codes;             // [steps · 8]: eight bits of each column
    uint32_t* nibbles;          // [steps], as a tile has them
    uint8_t* lows;              // [steps · 4]
    double square, low_square;  // Σ of squares of y less what four bits stand for, and eight
};

struct Product;
struct ScoreBlock;
struct Statistics;
struct ScoreGradients;

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    int width;       // lanes of a vector
    int quad_bytes;  // four codes of a query: 4 bytes as int8, 8 as int16 in the order 0 2 1 3
    // tile[c][r] = rows[r][c], lanes >= n are 0; false if a value is not finite. `ahead` are rows
    // to prefetch meanwhile, or null.
    bool (*pack)(const RowColumns* rows, const RowColumns* ahead, DType dtype, int n, int64_t cols,
                 float* tile);
    // sums[r] continues Σ_c tile[c][r]².
    void (*sqnorms)(Segment segment, float* sums);
    // sums[r] continues the chain of one query with the tile's rows; no codes.
    void (*advance)(Source source, Segment segment, const float* query, float* sums);
    void (*scan[SOURCES][MAX_GROUP])(Scan&);  // [source][group - 1]
    void (*row_sums[2])(const RowSums&);      // of products, of differences
    // sums[r] = Σ over both halves of a row's bytes: the low ones with query[0, bytes), the high
    // ones with what follows. There are as many rows and sums as n rounded up to whole fours.
    void (*dot_halves)(const uint8_t* const* rows, int64_t n, const int8_t* query, int64_t bytes,
                       float* sums);
    // sums[r] = Σ of the query's codes where a row's bit is set, column by column, the first the
    // lowest of a byte; counts like dot_halves'. Both reach to whole vectors of 64 columns, where
    // the query has zeros.
    void (*sum_bits)(const uint8_t* const* rows, int64_t n, const int8_t* query, int64_t columns,
                     float* sums);
    void (*widen_row)(RowColumns row, DType dtype, int64_t cols, float* out);
    // Σ x·y in fp64: eight sums, each of every eighth column, then the sum of these in order.
    double (*dot64)(const float* x, const float* y, int64_t cols);
    // The same for whole tiles; [2] is products, then differences. widen_tile writes a tile's two
    // segments as doubles [cols · TILE], columns by chain. scores64 writes [group, TILE] for
    // queries [cols, group], columns by chain too: Σ q·x with dot64's bits, or Σ (q − x)² column by
    // column. squares64 writes Σ x² [TILE].
    void (*widen_tile[2])(const Segment* segments, double* out);
    void (*scores64[2][MAX_GROUP])(const double* tile, const double* queries, int64_t cols,
                                   Ahead* ahead, double* out);
    void (*squares64)(const double* tile, int64_t cols, double* out);
    // Turns such sums [TILE] into scores: scale · sum, divided by norm · row_norms[r] where
    // row_norms is given (0 where that is 0). Returns the lanes whose score is above the threshold.
    uint64_t (*finish64)(double scale, double norm, const double* row_norms, double threshold,
                         double* sums);
    // Continues the sums with so many columns more, and writes their y.
    void (*add_prefix)(const float* x, const float* centre, int64_t cols, float* y,
                       PrefixSums* sums);
    // Σ max(|y| − reach, 0)² over so many steps of eight columns.
    float (*square_beyond)(const float* y, int64_t steps, float reach);
    void (*code_row)(const RowToCode& row, RowCodes* to);
    // Writes the signs of rows [first, first + count) of a tile, given its nibbles.
    void (*tile_signs)(const uint8_t* nibbles, int64_t steps, int first, int count, uint8_t* signs);
    // See nested.h.
    void (*product)(const Product&);
    void (*fold_block)(const ScoreBlock&, const Statistics&);
    void (*score_gradients)(const ScoreBlock&, const ScoreGradients&);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();  // this and the next three are null where not compiled
const Kernels* avx512_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neon_kernels();

// The kernels that this processor can run, best first.
std::vector<const Kernels*> available_kernels();

// How a call runs: by which kernels, on how many threads at most.
struct Run {
    const Kernels& kernels;
    int threads;
};

}  // namespace mrl
