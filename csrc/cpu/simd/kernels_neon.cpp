// The kernels for NEON, which every AArch64 processor has: 4 lanes, 32 registers.
#include "cpu/simd/kernels.h"
#include "cpu/training/nested.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace mrl {
namespace neon {

struct Simd {
    typedef float Vec __attribute__((vector_size(16)));
    typedef int32_t Int __attribute__((vector_size(16)));
    typedef Int Mask;
    static Mask above(Vec a, Vec b) { return ~(a <= b); }
    static Mask either(Mask a, Mask b) { return a | b; }
    static uint32_t bits(Mask m) {
        const Mask lanes = {1, 2, 4, 8};
        return vaddvq_s32(m & lanes);
    }
    static constexpr int WIDTH = 4;
    static constexpr bool TRANSPOSES = true;
    // Vectors of rows scored at a time, by the size of a group: enough chains to hide the latency,
    // few enough to stay in registers.
    static constexpr int rows_of(int group) { return group == 1 ? 16 : group == 2 ? 8 : 4; }

    static Vec load(const float* x) {
        Vec v;
        __builtin_memcpy(&v, x, sizeof v);
        return v;
    }
    static void store(float* x, Vec v) { __builtin_memcpy(x, &v, sizeof v); }
    static Vec broadcast(float x) { return vdupq_n_f32(x); }
#if defined(__clang__)
    static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
    static Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
#else
    // GCC assumes that those intrinsics read memory, and would store every sum in every step.
    static Vec fma(Vec a, Vec b, Vec c) {
        asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    static Vec fnma(Vec a, Vec b, Vec c) {
        asm("fmls %0.4s, %1.4s, %2.4s" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
#endif
    static float64x2_t to_double(float32x2_t x) { return vcvt_f64_f32(x); }
    static constexpr int ROW_QUERIES = 4;  // that row-major rows are summed with at a time
    static void add_lanes(const Vec (&v)[4], float* out) {
        store(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
    }
    static Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
    static Vec load(const F16* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))); }
    static Vec load(const BF16* x) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&x->bits), 16));
    }
    static Vec load(const I8* x) { return Vec{widen(x), widen(x + 1), widen(x + 2), widen(x + 3)}; }

    // tile[c][0..8) = rows[0..8)[c] for c < cols, a multiple of 8. Returns 0, or NaN if a value is
    // not finite. Prefetches as many columns of the 8 rows `ahead`, if not null.
    template <class T>
    static float transpose(const T* const* rows, const RowColumns* ahead, int64_t cols,
                           float* tile) {
        Prefetch<8> prefetch = {ahead, cols * int64_t(sizeof(T))};
        Vec check[4] = {};
        for (int64_t c = 0; c < cols; c += 4, tile += 4 * TILE) {
            prefetch.lines((sizeof(T) + 1) / 2);  // 8 rows of 4 columns are sizeof(T) / 2 lines
            for (int r = 0; r < 8; r += 4) {
                Vec row[4];
                for (int i = 0; i < 4; ++i) {
                    row[i] = load(rows[r + i] + c);
                    check[i] = fma(row[i], Vec{}, check[i]);
                }
                const float32x4x2_t top = vtrnq_f32(row[0], row[1]),
                                    bottom = vtrnq_f32(row[2], row[3]);
                for (int i = 0; i < 2; ++i) {
                    const float64x2_t a = vreinterpretq_f64_f32(top.val[i]),
                                      b = vreinterpretq_f64_f32(bottom.val[i]);
                    store(tile + i * TILE + r, vreinterpretq_f32_f64(vzip1q_f64(a, b)));
                    store(tile + (i + 2) * TILE + r, vreinterpretq_f32_f64(vzip2q_f64(a, b)));
                }
            }
        }
        return vaddvq_f32((check[0] + check[1]) + (check[2] + check[3]));
    }

    // Even and odd columns apart, as 16-bit values: a product is at most 255 · 128 and fits.
    struct Bytes {
        int16x8_t even, odd;
    };
    static constexpr int QUAD_BYTES = 8;
    static Int broadcast_int(int32_t x) { return vdupq_n_s32(x); }
    static Vec to_float(Int x) { return __builtin_convertvector(x, Vec); }
    static Bytes load_bytes(const uint8_t* x) {
        uint16x8_t bytes;
        __builtin_memcpy(&bytes, x, sizeof bytes);
        return {vreinterpretq_s16_u16(vandq_u16(bytes, vdupq_n_u16(255))),
                vreinterpretq_s16_u16(vshrq_n_u16(bytes, 8))};
    }
    static Int dot4(Bytes row, const char* query, Int sum) {
        int32_t even, odd;
        __builtin_memcpy(&even, query, 4);
        __builtin_memcpy(&odd, query + 4, 4);
        sum = vpadalq_s16(sum, vmulq_s16(row.even, vreinterpretq_s16_s32(vdupq_n_s32(even))));
        return vpadalq_s16(sum, vmulq_s16(row.odd, vreinterpretq_s16_s32(vdupq_n_s32(odd))));
    }

    typedef uint8x16_t U8;
    typedef uint16x8_t U16;
    static constexpr int SIGN_QUERIES = 6;
    static U8 load_u8(const uint8_t* x) { return vld1q_u8(x); }
    static U8 broadcast4(const char* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return vreinterpretq_u8_s32(vdupq_n_s32(four));
    }
    static U8 low(U8 x) { return vandq_u8(x, vdupq_n_u8(15)); }
    static U8 high(U8 x) { return vshrq_n_u8(x, 4); }
    static U8 lookup(const uint8_t* table, U8 index) { return vqtbl1q_u8(vld1q_u8(table), index); }
    static U8 add_u8(U8 a, U8 b) { return vaddq_u8(a, b); }
    static U16 add_u16(U16 a, U16 b) { return vaddq_u16(a, b); }
    static U16 as_u16(U8 x) { return vreinterpretq_u16_u8(x); }
    static U16 seconds(U8 x) { return vshrq_n_u16(as_u16(x), 8); }
    static void store_u16(U16 all, U16 odd, float* out) {
        const U16 even = all - (odd << 8);
        for (int i = 0; i < 8; ++i) out[2 * i] = even[i], out[2 * i + 1] = odd[i];
    }
    // The bytes of x whose bits are set, else zeros.
    static U8 where(const uint8_t* bits, U8 x) {
        const U8 each = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1])),
                 bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
        return vandq_u8(vtstq_u8(each, bit), x);
    }
    // A product is at most 15 · 128, so a sum of two is below 2^15.
    static Int dot4_nibbles(U8 row, U8 query, Int sum) {
        const int8x16_t x = vreinterpretq_s8_u8(row), q = vreinterpretq_s8_u8(query);
        return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(q)),
                                           vmull_s8(vget_high_s8(x), vget_high_s8(q))));
    }
};

#include "cpu/simd/kernel_table.h"

}  // namespace neon

const Kernels* neon_kernels() {
    static const Kernels kernels = neon::make_kernels("neon");
    return &kernels;
}

}  // namespace mrl

#else

namespace mrl {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace mrl

#endif
