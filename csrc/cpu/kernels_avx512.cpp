// The kernels for AVX-512: 16 lanes, 32 registers.
#include "cpu/engine.h"
#include "cpu/nested.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif

namespace mrl {
namespace avx512 {

#include "cpu/x86.h"

struct Simd {
    typedef __m512 Vec;
    typedef int32_t Int __attribute__((vector_size(64)));
    typedef __mmask16 Mask;
    static Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
    static Mask either(Mask a, Mask b) { return a | b; }
    static uint32_t bits(Mask m) { return m; }
    static constexpr int WIDTH = 16;
    static constexpr bool TRANSPOSES = true;
    // Vectors of rows a group: enough chains to hide the latency, few enough to stay in registers.
    static constexpr int rows_of([[maybe_unused]] int group) { return 4; }

    static Vec load(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }
    static Vec broadcast(float x) { return _mm512_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    template <class T>
    static float transpose(const T* const* rows, int64_t cols, float* tile) {
        return transpose8(rows, cols, tile);
    }
};

#include "cpu/kernel_table.h"

}  // namespace avx512

const Kernels* avx512_kernels() {
    static const Kernels kernels = avx512::make_kernels("avx512");
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
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace mrl

#endif
