// Codes of rows and of queries: how they are made, and how a scan holds them. All of a source lie
// in tiles [steps, TILE, bytes of a step]; the columns past the last have codes of queries that
// count for nothing.
//
// CODES: int8 codes of the first columns. A code times the vector's scale is a value to within half
// a scale; a step is of four columns, each plus 128.
//
// The ladder: eight bits of every column, of which the first is the sign. The first four, a number
// u of 0 to 15, stand for (u − 7.5) · scale; the last four, l, for (l − 7.5) · scale / 16 more.
// NIBBLES are the first four: byte j of a step has column j in its low half, column j + 4 in its
// high one; lows are the last four likewise. SIGNS are the first: bit j of a step's byte is column
// j. Vectors are coded less a centre, where one is given.
#pragma once

#include "cpu/search/search.h"

namespace mrl {

constexpr float TINY = 1e-30f;  // vectors of smaller values have codes of 0

inline int64_t code_steps(Source source, int64_t dim) {
    return source == Source::CODES ? (dim + 3) / 4 : (dim + 15) / 16 * 2;
}
inline int64_t code_tile_bytes(Source source, int64_t dim) {
    return code_steps(source, dim) * TILE * (source == Source::SIGNS ? 1 : 4);
}

// A query as a scan multiplies rows' codes with it.
struct CodedQuery {
    std::vector<char> steps;
    int64_t step_bytes;
    int32_t offset;
    float shift;   // of the sums, as offset; see Scan
    float scale;   // of a sum, beside the row's
    double error;  // norm of the query less what its codes stand for; not of signs
};
CodedQuery code_query(const Kernels& kernels, Source source, const float* x, int64_t dim);

// int8 codes of a row, to its tile.
struct Codes {
    std::vector<int8_t> codes;  // [dim, rounded up to whole quads]
    float scale;
    double error;  // norm of the prefix less what the codes stand for
};
Codes encode(const float* x, int64_t dim);
void put_codes(const Codes& codes, int64_t row, uint8_t* tiles);

// y = x − centre, which may be null.
void centred(const float* x, const float* centre, int64_t dim, float* y);

// What is known of a row beside its codes; norms are not rounded up.
struct LadderStats {
    double norm;       // of the row
    double size;       // of the row less the centre
    double error;      // of the row less the centre and what four bits stand for, or more
    double low_error;  // the same of eight bits
    float scale;       // of four bits' codes
    std::vector<float> factors, terms, inverses;  // [dims], see Ladder
};

// Codes rows less the centre, one after the other.
class LadderCoder {
  public:
    LadderCoder(const Kernels& kernels, const Ladder& ladder);
    const LadderStats& code(const float* x);
    // The codes of the last row to their tiles.
    void put(int64_t row, const SpanArrays& to) const;

  private:
    void describe(const float* x);
    double error_of(float unit, int shift, float zero);
    const Kernels& kernels_;
    const Ladder& ladder_;
    std::vector<uint8_t> codes_;                // [steps, 8], eight bits
    std::vector<float> beside_, rest_, signs_;  // [steps, 8]: y, y less what codes stand for, ±1
    LadderStats stats_;
};

}  // namespace mrl
