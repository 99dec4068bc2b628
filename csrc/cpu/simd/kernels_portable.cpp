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
    static constexpr int rows_of(int) { return 2; }  // vectors of rows a group

    static Vec load(const float* x) {
        Vec v;
        __builtin_memcpy(&v, x, sizeof v);
        return v;
    }
    static void store(float* x, Vec v) { __builtin_memcpy(x, &v, sizeof v); }
    static Vec broadcast(float x) { return Vec{x, x, x, x}; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
    static Vec max(Vec a, Vec b) { return a > b ? a : b; }
    static Mask above(Vec a, Vec b) { return ~(a <= b); }
    static Mask either(Mask a, Mask b) { return a | b; }
    static uint32_t bits(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
    template <class T>
    static Vec load(const T* x) {
        return Vec{widen(x), widen(x + 1), widen(x + 2), widen(x + 3)};
    }
    template <class T>
    static float transpose(const T* const*, const void* const*, int64_t, float*) {
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
};

#include "cpu/simd/kernel_table.h"

}  // namespace portable

const Kernels& portable_kernels() {
    static const Kernels kernels = portable::make_kernels("portable");
    return kernels;
}

}  // namespace mrl
