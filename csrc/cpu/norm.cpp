#include "cpu/norm.h"

#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int64_t kTaskFloats = 16384;  // below this a second thread costs more than it brings
constexpr int kSums = 4;                // partial sums that do not wait for each other

float sum_of_squares(const float* x, int64_t width) {
  vf sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= width; i += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) {
      const vf v = load(x + i + s * kLanes);
      sums[s] += v * v;
    }
  for (; i + kLanes <= width; i += kLanes) {
    const vf v = load(x + i);
    sums[0] += v * v;
  }
  if (i < width) {
    const vf v = load_partial(x + i, static_cast<int>(width - i));
    sums[0] += v * v;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void norm_row(const float* x, const float* weight, float* out, int64_t width, float eps) {
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(x, width) / static_cast<float>(width) + eps);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

template <typename Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  if (width == 0) return;
  const int64_t each = width < kTaskFloats ? kTaskFloats / width : 1;
  parallel_for((rows + each - 1) / each, [&](int64_t task) {
    const int64_t end = (task + 1) * each < rows ? (task + 1) * each : rows;
    for (int64_t r = task * each; r < end; ++r) row(r);
  });
}

void rms_norm(const float* x, int64_t x_stride, const float* weight, float* out, int64_t out_stride, int64_t rows,
              int64_t heads, int64_t width, float eps) {
  for_rows(rows, heads * width, [&](int64_t r) {
    for (int64_t h = 0; h < heads; ++h)
      norm_row(x + r * x_stride + h * width, weight, out + r * out_stride + h * width, width, eps);
  });
}

void add_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t width,
                  float eps) {
  for_rows(rows, width, [&](int64_t r) {
    const int64_t at = r * width;
    for (int64_t i = 0; i < width; ++i) residual[at + i] += x[at + i];
    norm_row(residual + at, weight, out + at, width, eps);
  });
}

}  // namespace

const NormOps& norm_ops() {
  static const NormOps ops = {rms_norm, add_rms_norm};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
