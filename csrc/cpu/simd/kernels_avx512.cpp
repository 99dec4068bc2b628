// The kernels for AVX-512: 16 lanes, 32 registers. kernels_avx512vnni.cpp compiles this file again
// with VNNI, the byte products of newer processors.
#include "cpu/simd/kernels.h"
#include "cpu/training/nested.h"

#if defined(MRL_VNNI)
#define MRL_TARGET "avx512f,avx512bw,avx512vnni,avx2,fma,f16c"
#define MRL_NAME avx512vnni
#define MRL_KERNELS avx512vnni_kernels
#else
#define MRL_TARGET "avx512f,avx512bw,avx2,fma,f16c"
#define MRL_NAME avx512
#define MRL_KERNELS avx512_kernels
#endif
#define MRL_TEXT(x) MRL_STRING(x)
#define MRL_STRING(x) #x
#define MRL_PRAGMA(x) _Pragma(#x)
#define MRL_PUSH(x) MRL_PRAGMA(GCC target(x))

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(MRL_TARGET))), apply_to = function)
#else
#pragma GCC push_options
MRL_PUSH(MRL_TARGET)
#endif

namespace mrl {
namespace MRL_NAME {

#include "cpu/simd/x86.h"

struct Simd {
    typedef __m512 Vec;
    typedef int32_t Int __attribute__((vector_size(64)));
    typedef __mmask16 Mask;
    static Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
    static Mask either(Mask a, Mask b) { return a | b; }
    static uint32_t bits(Mask m) { return m; }
    static constexpr int WIDTH = 16;
    static constexpr bool TRANSPOSES = true;
    // Vectors of rows scored at a time, by the size of a group: enough chains to hide the latency,
    // few enough to stay in registers.
    static constexpr int rows_of([[maybe_unused]] int group) { return 4; }

    static Vec load(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }
    static Vec broadcast(float x) { return _mm512_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
    static __m512d to_double(__m256 x) { return _mm512_cvtps_pd(x); }
    static constexpr int ROW_QUERIES = 4;  // that row-major rows are summed with at a time
    static void add_lanes(const Vec (&v)[4], float* out) {
        __m256 halves[4];
        for (int i = 0; i < 4; ++i) {
            const __m512d pairs = _mm512_castps_pd(v[i]);
            halves[i] =
                _mm256_add_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(255, pairs, 0)),
                              _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(255, pairs, 1)));
        }
        add_lanes8(halves, out);
    }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static Vec load(const F16* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    static Vec load(const BF16* x) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Vec load(const I8* x) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    template <class T>
    static float transpose(const T* const* rows, const RowColumns* ahead, int64_t cols,
                           float* tile) {
        return transpose8(rows, ahead, cols, tile);
    }

    static Int broadcast_int(int32_t x) { return Int(_mm512_set1_epi32(x)); }
    static Vec to_float(Int x) { return _mm512_cvtepi32_ps(__m512i(x)); }
#if defined(MRL_VNNI)
    typedef __m512i Bytes;
    static constexpr int QUAD_BYTES = 4;
    static Bytes load_bytes(const uint8_t* x) { return _mm512_loadu_si512(x); }
    static Int dot4(Bytes row, const char* query, Int sum) {
        int32_t quad;
        __builtin_memcpy(&quad, query, 4);
        return Int(_mm512_dpbusd_epi32(__m512i(sum), row, _mm512_set1_epi32(quad)));
    }
#else
    // Even and odd columns apart, as 16-bit values: their products' sums in pairs cannot saturate.
    struct Bytes {
        __m512i even, odd;
    };
    static constexpr int QUAD_BYTES = 8;
    static Bytes load_bytes(const uint8_t* x) {
        const __m512i bytes = _mm512_loadu_si512(x);
        return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
    }
    static Int dot4(Bytes row, const char* query, Int sum) {
        int32_t even, odd;
        __builtin_memcpy(&even, query, 4);
        __builtin_memcpy(&odd, query + 4, 4);
        return sum + Int(_mm512_madd_epi16(row.even, _mm512_set1_epi32(even))) +
               Int(_mm512_madd_epi16(row.odd, _mm512_set1_epi32(odd)));
    }
#endif

    typedef __m512i U8;
    typedef __m512i U16;
    static constexpr int SIGN_QUERIES = 6;
    static U8 load_u8(const uint8_t* x) { return _mm512_loadu_si512(x); }
    static U8 broadcast4(const char* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    static U8 low(U8 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static U8 high(U8 x) { return low(_mm512_srli_epi16(x, 4)); }
    static U8 lookup(const uint8_t* table, U8 index) {
        const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index);
    }
    static U8 add_u8(U8 a, U8 b) { return _mm512_add_epi8(a, b); }
    static U16 add_u16(U16 a, U16 b) { return _mm512_add_epi16(a, b); }
    static U16 as_u16(U8 x) { return x; }
    static U16 seconds(U8 x) { return _mm512_srli_epi16(x, 8); }
    static void store_u16(U16 all, U16 odd, float* out) {
        const U16 even = _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8));
        const __m512i low = _mm512_unpacklo_epi16(even, odd),  // rows 0–7, 16–23, …
            high = _mm512_unpackhi_epi16(even, odd);
        const auto put = [&](int lane, __m128i first, __m128i second) {
            const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
            store(out + 16 * lane, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(rows)));
        };
        put(0, _mm512_castsi512_si128(low), _mm512_castsi512_si128(high));
        put(1, _mm512_extracti32x4_epi32(low, 1), _mm512_extracti32x4_epi32(high, 1));
        put(2, _mm512_extracti32x4_epi32(low, 2), _mm512_extracti32x4_epi32(high, 2));
        put(3, _mm512_extracti32x4_epi32(low, 3), _mm512_extracti32x4_epi32(high, 3));
    }
    // The bytes of x whose bits are set, else zeros.
    static U8 where(const uint8_t* bits, U8 x) {
        uint64_t mask;
        __builtin_memcpy(&mask, bits, sizeof mask);
        return _mm512_maskz_mov_epi8(mask, x);
    }
    static Int dot4_nibbles(U8 row, U8 query, Int sum) {
#if defined(MRL_VNNI)
        return Int(_mm512_dpbusd_epi32(__m512i(sum), row, query));
#else  // a sum of two products is at most 15 · 256
        const __m512i pairs = _mm512_maddubs_epi16(row, query);
        return sum + Int(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
    }
};

#include "cpu/simd/kernel_table.h"

}  // namespace MRL_NAME

const Kernels* MRL_KERNELS() {
    static const Kernels kernels = MRL_NAME::make_kernels(MRL_TEXT(MRL_NAME));
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
const Kernels* MRL_KERNELS() { return nullptr; }
}  // namespace mrl

#endif
