// The table of one instruction set: every kernel, over a `Simd` type declared before the #include.

#include "cpu/simd/tile_kernels.h"

// use Vec and W of tile_kernels.h
#include "cpu/simd/nested_kernels.h"
#include "cpu/simd/row_kernels.h"
#include "cpu/simd/wide_kernels.h"

// use rounded of wide_kernels.h
#include "cpu/simd/ladder_kernels.h"

// Vectors of rows that are scored at a time. Those of NIBBLES take two registers each, one a half.
template <Source S>
constexpr int rows_of(int group) {
    return S == Source::NIBBLES && group > 3 ? 2 : Simd::rows_of(group);
}

template <Source S>
void fill_scans(Kernels& kernels) {
    void (**scan)(Scan&) = kernels.scan[int(S)];
    scan[0] = scan_as<S, 1, rows_of<S>(1)>;
    scan[1] = scan_as<S, 2, rows_of<S>(2)>;
    scan[2] = scan_as<S, 3, rows_of<S>(3)>;
    scan[3] = scan_as<S, 4, rows_of<S>(4)>;
    scan[4] = scan_as<S, 5, rows_of<S>(5)>;
    scan[5] = scan_as<S, 6, rows_of<S>(6)>;
}

template <Source S>
void fill_wide(Kernels& kernels) {
    kernels.widen_tile[int(S)] = widen_tile<S>;
    auto** scores = kernels.scores64[int(S)];
    scores[0] = scores64<S, 1>;
    scores[1] = scores64<S, 2>;
    scores[2] = scores64<S, 3>;
    scores[3] = scores64<S, 4>;
    scores[4] = scores64<S, 5>;
    scores[5] = scores64<S, 6>;
}

Kernels make_kernels(const char* name) {
    Kernels kernels = {name,
                       W,
                       Simd::QUAD_BYTES,
                       pack,
                       sqnorms,
                       advance,
                       {},
                       {row_sums<Source::PRODUCT>, row_sums<Source::DIFFERENCE>},
                       dot_halves,
                       sum_bits,
                       widen_row,
                       dot64,
                       {},
                       {},
                       squares64,
                       finish64,
                       add_prefix,
                       square_beyond,
                       code_row,
                       tile_signs,
                       product,
                       fold_block,
                       score_gradients};
    fill_scans<Source::PRODUCT>(kernels);
    fill_scans<Source::DIFFERENCE>(kernels);
    fill_scans<Source::CODES>(kernels);
    fill_scans<Source::SIGNS>(kernels);
    fill_scans<Source::NIBBLES>(kernels);
    fill_wide<Source::PRODUCT>(kernels);
    fill_wide<Source::DIFFERENCE>(kernels);
    return kernels;
}
