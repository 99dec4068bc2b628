// The kernels that this processor runs.
#include "cpu/simd/kernels.h"

namespace mrl {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available;
#if defined(MRL_PORTABLE_ONLY)
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) available.push_back(avx512vnni_kernels());
    if (avx512) available.push_back(avx512_kernels());
    if (avx2) available.push_back(avx2_kernels());
#elif defined(__aarch64__)
    available.push_back(neon_kernels());
#endif
    available.push_back(&portable_kernels());
    return available;
}

}  // namespace mrl
