// The table of one instruction set: every kernel, over the `Simd` type that was declared before.

#include "cpu/simd/tile_kernels.h"

// uses Vec and W of tile_kernels.h
#include "cpu/simd/nested_kernels.h"

template <Source S>
void fill_scans(Kernels& kernels) {
    void (**scan)(Scan&) = kernels.scan[int(S)];
    scan[0] = scan_as<S, 1, Simd::rows_of(1)>;
    scan[1] = scan_as<S, 2, Simd::rows_of(2)>;
    scan[2] = scan_as<S, 3, Simd::rows_of(3)>;
    scan[3] = scan_as<S, 4, Simd::rows_of(4)>;
    scan[4] = scan_as<S, 5, Simd::rows_of(5)>;
    scan[5] = scan_as<S, 6, Simd::rows_of(6)>;
}

Kernels make_kernels(const char* name) {
    Kernels kernels = {
        name,      W,     Simd::QUAD_BYTES, pack,       sqnorms,        advance, {}, dots,
        widen_row, dot64, product,          fold_block, score_gradients};
    fill_scans<Source::PRODUCT>(kernels);
    fill_scans<Source::DIFFERENCE>(kernels);
    fill_scans<Source::CODES>(kernels);
    return kernels;
}
