#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct SamplingArgs {
  const float* logits;  // [rows, vocab]
  const uint8_t* mask;  // [rows, vocab], 0: not allowed; or null
  const int64_t* seen;  // [rows, 3] address of ids (int64), address of counts (int32), how many; or null
  int64_t* out;         // [rows]
  int64_t rows, vocab;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const float* presence_penalty;
  const float* frequency_penalty;
  const int64_t* seeds;
  const int64_t* steps;
};

// What stands in `out` for a row from which nothing can be drawn.
enum SamplingFailure : int64_t { kNotFinite = -1, kNoToken = -2, kBadId = -3 };

struct SamplingOps {
  void (*sample)(const SamplingArgs& args);
};

UMA_DECLARE_PER_ISA(const SamplingOps& sampling_ops();)

}  // namespace uma
