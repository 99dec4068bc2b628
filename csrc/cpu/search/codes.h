// int8 codes of vectors' first columns: how they are made, and how rows and queries hold them.
//
// A code times the vector's scale is a value to within half a scale. Four columns are a quad, the
// last one padded with codes of 0. Rows lie in tiles [quads, TILE, 4] of codes plus 128, queries in
// panels [quads, group, Kernels::quad_bytes]; Kernels::scan of Source::CODES multiplies them.
#pragma once

#include "cpu/simd/kernels.h"

namespace mrl {

struct Codes {
    std::vector<int8_t> codes;  // [dim, rounded up to whole quads]
    float scale;
    double error;  // norm of the prefix less what the codes stand for
};
Codes encode(const float* x, int64_t dim);

constexpr float TINY = 1e-30f;  // vectors of smaller values have codes of 0

inline int64_t quads_of(int64_t dim) { return (dim + 3) / 4; }
inline int64_t code_tile_bytes(int64_t dim) { return quads_of(dim) * TILE * 4; }

// A row's codes to its tile, of a span's tiles.
void put_codes(const Codes& codes, int64_t row, uint8_t* tiles);

// Four codes of a query as a kernel reads them.
void put_quad(const int8_t* codes, int64_t bytes, char* quad);

// −128 · Σ codes: what 128 more on each of a row's codes added to its product with a query.
int32_t offset_of(const Codes& query);

}  // namespace mrl
