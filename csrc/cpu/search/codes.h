// Codes of rows and of queries: how they are made, and how they lie in memory. Rows' codes lie in
// tiles [steps, TILE, bytes of a step], but for those of few rows. A last step may reach past the
// last column: there the query's codes add 0 to every sum.
//
// CODES: int8 codes of the first columns. A code times the vector's scale is the value to within
// half a scale. A step holds four columns, each as its code plus 128.
//
// The ladder: eight bits of every column, of which the first is the sign. The first four, a number
// u of 0 to 15, stand for (u − 7.5) · scale; the last four, l, for (l − 7.5) · scale / 16 more.
// NIBBLES are the first four: byte j of a step has column j in its low half, column j + 4 in its
// high one. SIGNS are the first: bit j of a step's byte is column j. The last four, lows, are read
// of few rows, and lie row by row: byte j has column j in its low half, and in its high one that of
// so many columns later as a row has bytes. Vectors are coded less a centre, where one is given,
// and rotated, where signs are.
#pragma once

#include "cpu/search/search.h"

namespace mrl {

constexpr float TINY = 1e-30f;         // vectors of smaller values have codes of 0
constexpr float LEAST_CODED = 2e-36f;  // the same of rows of I8, whose scales are never subnormal

inline int64_t code_steps(Source source, int64_t dim) {
    return source == Source::CODES ? (dim + 3) / 4 : (dim + 15) / 16 * 2;
}
inline int64_t code_tile_bytes(Source source, int64_t dim) {
    return code_steps(source, dim) * TILE * (source == Source::SIGNS ? 1 : 4);
}
inline int64_t low_bytes(int64_t dim) { return 4 * code_steps(Source::NIBBLES, dim); }  // of a row

// A query in the form that a scan multiplies rows' codes with.
struct CodedQuery {
    std::vector<char> steps;  // [steps, step_bytes]
    int64_t step_bytes;
    int32_t offset;             // added to sums of CODES
    float shift;                // added to sums of SIGNS and NIBBLES
    float scale;                // the value of a sum of 1, but for the row's scale
    double error;               // norm of the query less what its codes stand for; 0 for SIGNS
    std::vector<int8_t> plain;  // the codes of CODES and NIBBLES, column by column
};
CodedQuery code_query(const Kernels& kernels, Source source, const float* x, int64_t dim);

// int8 codes of a row or a query.
struct Codes {
    std::vector<int8_t> codes;  // [dim, rounded up to whole quads]
    float scale;
    double error;  // norm of the prefix less what the codes stand for
};
Codes encode(const float* x, int64_t dim);
// Rounds x to codes of −127 to 127 and returns their scale, max |x| / 127; all are 0 where no value
// is as large as `least`.
float quantize(const float* x, int64_t dim, float least, int8_t* codes);
// Writes a row's codes to its tile.
void put_codes(const Codes& codes, int64_t row, uint8_t* tiles);

// y = x − centre, which may be null.
void centred(const float* x, const float* centre, int64_t dim, float* y);

// Rotates the columns from one of the ladder's dims to the next among themselves, up to `dim`, one
// of them, so that a few large ones spread over all; norms and inner products of prefixes stay. The
// columns are multiplied by the signs and the normalised Hadamard matrix: the first 2ⁿ, and where
// these are not all the last 2ⁿ, n as great as can be.
void rotate(const Ladder& ladder, int64_t dim, float* y);

// Room for the rounding of two vectors that are rotated, as a share of their norms' product: each
// is rounded at most twice 12 + 2 times, for every sum and the scale, by 2⁻²⁴ of its norm at most.
constexpr double ROTATION_ROUNDING = 0x1p-18;

// The statistics of a row beside its codes; norms are not rounded up yet.
struct LadderStats {
    double norm;       // of the row
    double size;       // of the row less the centre, as it is coded
    double error;      // of the row less the centre and what four bits stand for, rounded up
    double low_error;  // the same of eight bits
    float scale;       // of four bits' codes
    std::vector<float> factors, terms, inverses;  // [dims], see Ladder
};

// Codes rows less the centre and rotated, a tile at a time.
class LadderCoder {
  public:
    LadderCoder(const Kernels& kernels, const Ladder& ladder);
    // Codes a row for a lane of a tile, and writes its lows.
    const LadderStats& code(const float* x, int lane, uint8_t* lows);
    // Writes the tile's lanes [first, first + count), which were coded last.
    void put(int64_t tile, int first, int count, const SpanArrays& to);

  private:
    void describe(const float* x);
    double error_of(double square) const;
    const Kernels& kernels_;
    const Ladder& ladder_;
    int64_t width_, steps_;
    std::vector<float> centre_, zeros_, beside_;  // [steps, 8]; the last is y
    std::vector<int32_t> codes_;                  // [steps, 8]: eight bits of the row coded last
    std::vector<uint32_t> nibbles_;               // [TILE, steps]: of the rows coded last
    std::vector<float> tile_;                     // [steps, TILE]: nibbles by steps
    PrefixSums sums_, coded_;                     // before y is rotated, and after
    LadderStats stats_;
};

}  // namespace mrl
