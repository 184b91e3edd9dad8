// Low-rank updates of a batch in which each row names its adapter.
//
// A packed adapter is one buffer: a 64-byte LoraHeader, then A [R, K] in panels over R, then B [N, R] in panels of 32 over N,
// each panel [depth][width] factors, zero padded. A's panels are 32 wide; the last is 16 wide where 16 hold the rest. Factors are kept
// in the type they came in and widened as they are read: fewer bytes, and the bits that fp32 factors of the same values give.
#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

enum class FactorType : int32_t { fp32, fp16, bf16 };

struct alignas(64) LoraHeader {
  int64_t rank, k, n;
  float scaling;
  FactorType type;
};

// One projection of a site whose projections share x: where its columns begin in out, and its adapters.
struct LoraSlice {
  const uint8_t* const* adapters;
  int64_t column;
};

struct LoraOps {
  int64_t (*packed_bytes)(int64_t rank, int64_t k, int64_t n, FactorType type);
  // False, and nothing is written, where a factor holds a NaN or an infinity.
  bool (*pack)(uint8_t* to, const LoraHeader& header, const void* a, const void* b);
  // For each of `num_slices` slices and each i < count, adapter = slices[s].adapters[i]:
  // out[t, column ..] += scaling * (x[t] A^T) B^T over the rows t = order[offsets[i]] .. order[offsets[i + 1] - 1].
  // All adapters have the same k; rows of out begin `out_stride` floats apart. A null adapter adds nothing.
  void (*lora)(const float* x, float* out, int64_t out_stride, const LoraSlice* slices, int64_t num_slices,
               const int32_t* offsets, int64_t count, const int32_t* order);
};

UMA_DECLARE_PER_ISA(const LoraOps& lora_ops();)

}  // namespace uma
