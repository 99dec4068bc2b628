// The kernels for AVX-512 with VNNI.
#define MRL_VNNI
#include "cpu/simd/kernels_avx512.cpp"
