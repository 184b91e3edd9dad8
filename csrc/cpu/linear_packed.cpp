#include <cstring>

#include "cpu/linear.h"
#include "cpu/linear_tile.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

// Features past the last are rows of zeros.
void pack_dense(const PackedWeight& to, const float* weight) {
  static thread_local Scratch scratch;
  const float* zeros = static_cast<const float*>(std::memset(scratch.floats(to.k), 0, to.k * sizeof(float)));
  parallel_for(to.panels(), [&](int64_t panel) {
    const float* rows[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t n = panel * kPanel + j;
      rows[j] = n < to.n ? weight + n * to.k : zeros;
    }
    interleave_rows(rows, kPanel, to.k, reinterpret_cast<float*>(to.data + panel * to.panel_bytes()));
  });
}

void pack_quantized(const PackedWeight& to, const uint8_t* quants, const float* scales, const float* mins) {
  const int64_t blocks = to.k / to.block_size, size = to.block_size;
  const int64_t row_bytes = to.k * to.bits / 8, head = to.has_mins ? 2 * kPanel : kPanel;
  parallel_for(to.panels(), [&](int64_t panel) {
    const int64_t first = panel * kPanel, features = to.n - first < kPanel ? to.n - first : kPanel;
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* at = to.data + panel * to.panel_bytes() + block * to.block_bytes();
      std::memset(at, 0, to.block_bytes());
      float* parameters = reinterpret_cast<float*>(at);
      uint8_t* packed = at + head * sizeof(float);
      for (int64_t j = 0; j < features; ++j) {
        parameters[j] = scales[(first + j) * blocks + block];
        if (to.has_mins) parameters[kPanel + j] = mins[(first + j) * blocks + block];
        const uint8_t* from = quants + (first + j) * row_bytes + block * size * to.bits / 8;
        if (to.bits == 8) {
          for (int64_t i = 0; i < size; ++i) packed[i * kPanel + j] = from[i];
        } else {
          const int shift = j < 16 ? 0 : 4;
          uint8_t* column = packed + j % 16;
          for (int64_t i = 0; i < size / 2; ++i) {
            column[2 * i * 16] |= static_cast<uint8_t>((from[i] & 15) << shift);
            column[(2 * i + 1) * 16] |= static_cast<uint8_t>((from[i] >> 4) << shift);
          }
        }
      }
    }
  });
}

void gather_row(const PackedWeight& w, int64_t id, float* out) {
  const uint8_t* panel = w.data + id / kPanel * w.panel_bytes();
  const int64_t j = id % kPanel;
  if (w.bits == 32) {
    const float* from = reinterpret_cast<const float*>(panel) + j;
    for (int64_t k = 0; k < w.k; ++k) out[k] = from[k * kPanel];
    return;
  }
  const int shift = j < 16 ? 0 : 4;
  for (int64_t block = 0; block < w.k / w.block_size; ++block, panel += w.block_bytes(), out += w.block_size) {
    const float* parameters = reinterpret_cast<const float*>(panel);
    const uint8_t* quants = panel + (w.has_mins ? 256 : 128);
    for (int i = 0; i < w.block_size; ++i) {
      const int quant = w.bits == 8 ? static_cast<int8_t>(quants[i * kPanel + j]) : quants[i * 16 + j % 16] >> shift & 15;
      // A vector, so that `rounded` keeps the product and the sum apart here as it does in the products.
      vf weight = rounded(splat(static_cast<float>(quant)) * splat(parameters[j]));
      if (w.has_mins) weight += splat(parameters[kPanel + j]);
      out[i] = weight[0];
    }
  }
}

int64_t gather_rows(const PackedWeight& w, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= w.n) return i;
  constexpr int64_t kRows = 8;  // a task's
  parallel_for((count + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < count && i < (task + 1) * kRows; ++i) gather_row(w, ids[i], out + i * w.k);
  });
  return -1;
}

}  // namespace

const PackedWeightOps& packed_weight_ops() {
  static const PackedWeightOps ops = {gather_rows, pack_dense, pack_quantized};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
