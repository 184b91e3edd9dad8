// Matrix products with a packed weight: x W^T, its rows, and how it is packed.
//
// A weight [N, K] is kept in panels of 32 output features, zero padded, each panel one run of memory over K:
//   fp32    [K][32] floats
//   4-bit   for each block of K: scales [32] fp32, mins [32] fp32 (if any), quants [block_size][16] bytes:
//           feature j of the panel in the low nibble of byte j, feature j + 16 in the high one
//   8-bit   the same with quants [block_size][32] int8
// The layout is the same for every instruction set.
#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

constexpr int64_t kPanel = 32;

struct PackedWeight {
  uint8_t* data;   // 64-byte aligned
  int64_t n, k;
  int bits;        // 32, 8 or 4
  int block_size;  // 32 or 16; unused when bits is 32
  bool has_mins;

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t block_bytes() const { return 128 + (has_mins ? 128 : 0) + block_size * kPanel * bits / 8; }
  // Bytes of a panel's first `depth` k, a whole number of blocks.
  int64_t bytes_of(int64_t depth) const { return bits == 32 ? depth * kPanel * 4 : depth / block_size * block_bytes(); }
  int64_t panel_bytes() const { return bytes_of(k); }
};

struct LinearOps {
  // out[t * out_stride + n] = bias[n] + sum over k of x[t, k] * w[n, k]; bias may be null. Nothing else is written.
  void (*linear)(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t out_stride);
};

struct PackedWeightOps {
  // out[i, :] = w[ids[i], :], dequantised. Returns the first place whose id is no row of w (nothing is written), else -1.
  int64_t (*gather_rows)(const PackedWeight& w, const int64_t* ids, int64_t count, float* out);
  // Fill `to` (panels() * panel_bytes() at `to.data`) from a dense weight, or from a quantised one's parts.
  void (*pack_dense)(const PackedWeight& to, const float* weight);
  void (*pack_quantized)(const PackedWeight& to, const uint8_t* quants, const float* scales, const float* mins);
};

UMA_DECLARE_PER_ISA(const LinearOps& linear_ops(); const PackedWeightOps& packed_weight_ops();)

}  // namespace uma
