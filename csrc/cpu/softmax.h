// The cross-entropy's epilogues on a block of scores, contiguous [rows, cols].
#pragma once

#include "cpu/engine.h"

namespace mrl {

// Continues each row's running maximum, Σ exp(z − maximum), and Σ soft·z where soft [cols] is
// given.
void softmax_stats(const Kernels& kernels, const float* scores, int64_t rows, int64_t cols,
                   const float* soft, int threads, float* row_max, float* sum, double* soft_sum);

// grad = soft_scale·soft − p_scale·exp((z − row_max) − log_sum).
void softmax_grad(const Kernels& kernels, const float* scores, int64_t rows, int64_t cols,
                  const float* soft, int threads, const float* row_max, const float* log_sum,
                  const float* p_scale, const float* soft_scale, float* grad);

}  // namespace mrl
