#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct NormOps {
  // out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight for `rows` rows of `width` floats; out may be x.
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps);
  // residual[r] += x[r], then rms_norm of residual into out; out may be x.
  void (*add_rms_norm)(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t width,
                       float eps);
};

UMA_DECLARE_PER_ISA(const NormOps& norm_ops();)

}  // namespace uma
