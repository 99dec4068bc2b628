// The kernels for AVX2: 8 lanes, 16 registers.
#include "cpu/engine.h"
#include "cpu/nested.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace mrl {
namespace avx2 {

#include "cpu/x86.h"

struct Simd {
    typedef __m256 Vec;
    typedef int32_t Int __attribute__((vector_size(32)));
    typedef __m256 Mask;
    static Mask above(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
    static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
    static uint32_t bits(Mask m) { return _mm256_movemask_ps(m); }
    static constexpr int WIDTH = 8;
    static constexpr bool TRANSPOSES = true;
    // Vectors of rows a group: enough chains to hide the latency, few enough to stay in registers.
    static constexpr int rows_of([[maybe_unused]] int group) {
        return group == 1 ? 8 : group == 2 ? 4 : 2;
    }

    static Vec load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
    static Vec broadcast(float x) { return _mm256_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    template <class T>
    static float transpose(const T* const* rows, int64_t cols, float* tile) {
        return transpose8(rows, cols, tile);
    }
};

#include "cpu/kernel_table.h"

}  // namespace avx2

const Kernels* avx2_kernels() {
    static const Kernels kernels = avx2::make_kernels("avx2");
    return &kernels;
}

}  // namespace mrl

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace mrl {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace mrl

#endif
