// The kernels for AVX2: 8 lanes, 16 registers.
#include "cpu/simd/kernels.h"
#include "cpu/training/nested.h"

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

#include "cpu/simd/x86.h"

struct Simd {
    typedef __m256 Vec;
    typedef int32_t Int __attribute__((vector_size(32)));
    typedef __m256 Mask;
    static Mask above(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
    static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
    static uint32_t bits(Mask m) { return _mm256_movemask_ps(m); }
    static constexpr int WIDTH = 8;
    static constexpr bool TRANSPOSES = true;
    // Vectors of rows scored at a time, by the size of a group: enough chains to hide the latency,
    // few enough to stay in registers.
    static constexpr int rows_of([[maybe_unused]] int group) {
        return group == 1 ? 8 : group == 2 ? 4 : 2;
    }

    static Vec load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
    static Vec broadcast(float x) { return _mm256_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
    static __m256d to_double(__m128 x) { return _mm256_cvtps_pd(x); }
    static constexpr int ROW_QUERIES = 2;  // that row-major rows are summed with at a time
    static void add_lanes(const Vec (&v)[4], float* out) { add_lanes8(v, out); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    template <class T>
    static Vec load(const T* x) {
        return load8(x);
    }
    template <class T>
    static float transpose(const T* const* rows, const RowColumns* ahead, int64_t cols,
                           float* tile) {
        return transpose8(rows, ahead, cols, tile);
    }

    // Even and odd columns apart, as 16-bit values: their products' sums in pairs cannot saturate.
    struct Bytes {
        __m256i even, odd;
    };
    static constexpr int QUAD_BYTES = 8;
    static Int broadcast_int(int32_t x) { return Int(_mm256_set1_epi32(x)); }
    static Vec to_float(Int x) { return _mm256_cvtepi32_ps(__m256i(x)); }
    static Bytes load_bytes(const uint8_t* x) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
    }
    static Int dot4(Bytes row, const char* query, Int sum) {
        int32_t even, odd;
        __builtin_memcpy(&even, query, 4);
        __builtin_memcpy(&odd, query + 4, 4);
        return sum + Int(_mm256_madd_epi16(row.even, _mm256_set1_epi32(even))) +
               Int(_mm256_madd_epi16(row.odd, _mm256_set1_epi32(odd)));
    }

    typedef __m256i U8;
    typedef __m256i U16;
    static constexpr int SIGN_QUERIES = 3;
    static U8 load_u8(const uint8_t* x) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    }
    static U8 broadcast4(const char* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }
    static U8 low(U8 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static U8 high(U8 x) { return low(_mm256_srli_epi16(x, 4)); }
    static U8 lookup(const uint8_t* table, U8 index) {
        const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
    }
    static U8 add_u8(U8 a, U8 b) { return _mm256_add_epi8(a, b); }
    static U16 add_u16(U16 a, U16 b) { return _mm256_add_epi16(a, b); }
    static U16 as_u16(U8 x) { return x; }
    static U16 seconds(U8 x) { return _mm256_srli_epi16(x, 8); }
    static void store_u16(U16 all, U16 odd, float* out) {
        const U16 even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
        const __m256i low = _mm256_unpacklo_epi16(even, odd),  // rows 0–7 and 16–23
            high = _mm256_unpackhi_epi16(even, odd);
        const __m128i rows[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                                 _mm256_extracti128_si256(low, 1),
                                 _mm256_extracti128_si256(high, 1)};
        for (int i = 0; i < 4; ++i)
            store(out + 8 * i, _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(rows[i])));
    }
    // The bytes of x whose bits are set, else zeros.
    static U8 where(const uint8_t* bits, U8 x) {
        const __m256i four = broadcast4(reinterpret_cast<const char*>(bits)),
                      own = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                              0x0101010101010101, 0),
                      bit = _mm256_set1_epi64x(0x8040201008040201),
                      set = _mm256_and_si256(_mm256_shuffle_epi8(four, own), bit);
        return _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), x);
    }
    // A sum of two products is at most 15 · 256 and fits 16 bits.
    static Int dot4_nibbles(U8 row, U8 query, Int sum) {
        const __m256i pairs = _mm256_maddubs_epi16(row, query);
        return sum + Int(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

#include "cpu/simd/kernel_table.h"

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
