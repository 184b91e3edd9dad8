#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct ActivationOps {
  // out[i] = silu(gate[i]) * up[i] and gelu_tanh(gate[i]) * up[i], over n floats; out may be gate or up.
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  void (*geglu_tanh)(const float* gate, const float* up, float* out, int64_t n);
};

UMA_DECLARE_PER_ISA(const ActivationOps& activation_ops();)

}  // namespace uma
