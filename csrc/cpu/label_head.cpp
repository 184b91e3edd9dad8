#include "cpu/label_head.h"

#include "uma/scratch.h"
#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

// Four chains of vectors, folded, then the rest one by one.
float dot(const float* a, const float* b, int64_t n) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) sums[c] += load(a + i + c * kLanes) * load(b + i + c * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += load(a + i) * load(b + i);
  float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

bool label_head(const float* hidden, int64_t hidden_rows, const int64_t* rows, int64_t count, const PackedWeight& w,
                const int64_t* ids, int64_t labels, float* out) {
  for (int64_t i = 0; i < count; ++i)
    if (rows[i] < 0 || rows[i] >= hidden_rows) return false;
  static thread_local Scratch scratch;
  float* weights = scratch.floats(labels * w.k);
  if (packed_weight_ops().gather_rows(w, ids, labels, weights) >= 0) return false;
  constexpr int64_t kRows = 8;  // a task's
  parallel_for((count + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t i = task * kRows; i < count && i < (task + 1) * kRows; ++i)
      for (int64_t j = 0; j < labels; ++j) out[i * labels + j] = dot(hidden + rows[i] * w.k, weights + j * w.k, w.k);
  });
  return true;
}

}  // namespace

const LabelHeadOps& label_head_ops() {
  static const LabelHeadOps ops = {label_head};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
