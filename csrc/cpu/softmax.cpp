#include "cpu/softmax.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace mrl {
namespace {

constexpr int64_t BLOCK = 4096;               // scores of a row worked on while they are in L1
constexpr int64_t SCORES_A_THREAD = 1 << 16;  // below this, starting a thread costs more

int threads_for(int64_t scores, int threads) {
    return int(std::clamp<int64_t>(scores / SCORES_A_THREAD, 1, threads));
}

}  // namespace

void softmax_stats(const Kernels& kernels, const float* scores, int64_t rows, int64_t cols,
                   const float* soft, int threads, float* row_max, float* sum, double* soft_sum) {
    threads = threads_for(rows * cols, threads);
    Ranges ranges(rows, std::max<int64_t>(1, rows / (threads * 8)));
    parallel(threads, [&](int) {
        for (int64_t row, last; ranges.next(&row, &last);)
            for (; row < last; ++row)
                for (int64_t c = 0; c < cols; c += BLOCK)
                    kernels.softmax_stats(scores + row * cols + c, soft ? soft + c : nullptr,
                                          std::min(BLOCK, cols - c), row_max + row, sum + row,
                                          soft ? soft_sum + row : nullptr);
    });
}

void softmax_grad(const Kernels& kernels, const float* scores, int64_t rows, int64_t cols,
                  const float* soft, int threads, const float* row_max, const float* log_sum,
                  const float* p_scale, const float* soft_scale, float* grad) {
    threads = threads_for(rows * cols, threads);
    Ranges ranges(rows, std::max<int64_t>(1, rows / (threads * 8)));
    parallel(threads, [&](int) {
        for (int64_t row, last; ranges.next(&row, &last);)
            for (; row < last; ++row)
                kernels.softmax_grad(scores + row * cols, soft, cols, row_max[row], log_sum[row],
                                     p_scale[row], soft ? soft_scale[row] : 0.0f,
                                     grad + row * cols);
    });
}

}  // namespace mrl
