#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct ActivationOps {
  // A row of gate_up holds `width` floats of gate, then as many of up; a row of out holds silu(gate) * up, or
  // gelu_tanh(gate) * up.
  void (*swiglu)(const float* gate_up, float* out, int64_t rows, int64_t width);
  void (*geglu_tanh)(const float* gate_up, float* out, int64_t rows, int64_t width);
};

UMA_DECLARE_PER_ISA(const ActivationOps& activation_ops();)

}  // namespace uma
