// The kernels for any processor: 4-lane vectors, which compilers map to SSE2, NEON or plain code.
#include "cpu/simd/kernels.h"
#include "cpu/training/nested.h"

namespace mrl {
namespace portable {

struct Simd {
    typedef float Vec __attribute__((vector_size(16)));
    typedef int32_t Int __attribute__((vector_size(16)));
    typedef Int Mask;
    static constexpr int WIDTH = 4;
    static constexpr bool TRANSPOSES = false;
    static constexpr int rows_of(int) { return 2; }  // vectors of rows scored at a time

    static Vec load(const float* x) {
        Vec v;
        __builtin_memcpy(&v, x, sizeof v);
        return v;
    }
    static void store(float* x, Vec v) { __builtin_memcpy(x, &v, sizeof v); }
    static Vec broadcast(float x) { return Vec{x, x, x, x}; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
    typedef float Half __attribute__((vector_size(8)));
    typedef double Wide __attribute__((vector_size(16)));
    static Wide to_double(Half x) { return __builtin_convertvector(x, Wide); }
    static constexpr int ROW_QUERIES = 2;  // that row-major rows are summed with at a time
    static void add_lanes(const Vec (&v)[4], float* out) {
        for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
    static Vec max(Vec a, Vec b) { return a > b ? a : b; }
    static Mask above(Vec a, Vec b) { return ~(a <= b); }
    static Mask either(Mask a, Mask b) { return a | b; }
    static uint32_t bits(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
    template <class T>
    static Vec load(const T* x) {
        return Vec{widen(x), widen(x + 1), widen(x + 2), widen(x + 3)};
    }
    template <class T>
    static float transpose(const T* const*, const RowColumns*, int64_t, float*) {
        return 0.0f;
    }

    struct Bytes {
        uint8_t at[16];
    };
    static constexpr int QUAD_BYTES = 4;
    static Int broadcast_int(int32_t x) { return Int{x, x, x, x}; }
    static Vec to_float(Int x) { return __builtin_convertvector(x, Vec); }
    static Bytes load_bytes(const uint8_t* x) {
        Bytes bytes;
        __builtin_memcpy(&bytes, x, sizeof bytes);
        return bytes;
    }
    static Int dot4(Bytes row, const char* query, Int sum) {
        int8_t q[4];
        __builtin_memcpy(q, query, sizeof q);
        for (int lane = 0; lane < 4; ++lane)
            for (int i = 0; i < 4; ++i) sum[lane] += int32_t(row.at[lane * 4 + i]) * q[i];
        return sum;
    }

    typedef uint8_t U8 __attribute__((vector_size(16)));
    typedef uint16_t U16 __attribute__((vector_size(16)));
    static constexpr int SIGN_QUERIES = 1;
    static U8 load_u8(const uint8_t* x) {
        U8 bytes;
        __builtin_memcpy(&bytes, x, sizeof bytes);
        return bytes;
    }
    static U8 broadcast4(const char* x) {
        U8 bytes;
        for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(x[i % 4]);
        return bytes;
    }
    static U8 low(U8 x) { return x & 15; }
    static U8 high(U8 x) { return x >> 4; }
    static U8 lookup(const uint8_t* table, U8 index) {
        for (int i = 0; i < 16; ++i) index[i] = table[index[i]];
        return index;
    }
    static U8 add_u8(U8 a, U8 b) { return a + b; }
    static U16 add_u16(U16 a, U16 b) { return a + b; }
    static U16 as_u16(U8 x) {
        U16 pairs;  // the first byte of a pair is the lower one
        for (int i = 0; i < 8; ++i) pairs[i] = uint16_t(x[2 * i] | x[2 * i + 1] << 8);
        return pairs;
    }
    static U16 seconds(U8 x) { return as_u16(x) >> 8; }
    static void store_u16(U16 all, U16 odd, float* out) {
        const U16 even = all - (odd << 8);
        for (int i = 0; i < 8; ++i) out[2 * i] = even[i], out[2 * i + 1] = odd[i];
    }
    // The bytes of x whose bits are set, else zeros.
    static U8 where(const uint8_t* bits, U8 x) {
        for (int i = 0; i < 16; ++i) x[i] = bits[i / 8] >> i % 8 & 1 ? x[i] : 0;
        return x;
    }
    static Int dot4_nibbles(U8 row, U8 query, Int sum) {
        for (int i = 0; i < 16; ++i) sum[i / 4] += int32_t(row[i]) * int8_t(query[i]);
        return sum;
    }
};

#include "cpu/simd/kernel_table.h"

}  // namespace portable

const Kernels& portable_kernels() {
    static const Kernels kernels = portable::make_kernels("portable");
    return kernels;
}

}  // namespace mrl
