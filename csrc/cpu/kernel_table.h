// What one instruction set offers: every kernel over the `Simd` type that was declared before.

#include "cpu/tile_kernels.h"

// over what tile_kernels.h declares
#include "cpu/nested_kernels.h"

template <Metric M>
void fill_scans(Kernels& kernels) {
    void (**scan)(const Scan&) = kernels.scan[int(M)];
    scan[0] = scan_as<M, 1, Simd::rows_of(1)>;
    scan[1] = scan_as<M, 2, Simd::rows_of(2)>;
    scan[2] = scan_as<M, 3, Simd::rows_of(3)>;
    scan[3] = scan_as<M, 4, Simd::rows_of(4)>;
    scan[4] = scan_as<M, 5, Simd::rows_of(5)>;
    scan[5] = scan_as<M, 6, Simd::rows_of(6)>;
}

Kernels make_kernels(const char* name) {
    Kernels kernels = {name, W, pack, sqnorms, advance, {}, product, fold_block, score_gradients};
    fill_scans<Metric::IP>(kernels);
    fill_scans<Metric::COSINE>(kernels);
    fill_scans<Metric::L2>(kernels);
    return kernels;
}
