#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct NormOps {
  // out[r, h] = x[r, h] / sqrt(mean(x[r, h]^2) + eps) * weight, each of `width` floats; rows of x and out begin
  // `x_stride` and `out_stride` floats apart, the `heads` of a row follow each other; out may be x.
  void (*rms_norm)(const float* x, int64_t x_stride, const float* weight, float* out, int64_t out_stride, int64_t rows,
                   int64_t heads, int64_t width, float eps);
  // residual[r] += x[r], then rms_norm of residual into out; out may be x.
  void (*add_rms_norm)(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t width,
                       float eps);
};

UMA_DECLARE_PER_ISA(const NormOps& norm_ops();)

}  // namespace uma
