#include "cpu/rope.h"

#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int64_t kTaskFloats = 16384;  // below this a second thread costs more than it brings

void rotate(vf& first, vf& second, vf cos, vf sin) {
  const vf x = first, y = second;
  first = x * cos - y * sin;
  second = y * cos + x * sin;
}

void rotate_heads(float* x, int64_t heads, int64_t half, const float* cos, const float* sin) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      vf first = load(x + i), second = load(x + half + i);
      rotate(first, second, load(cos + i), load(sin + i));
      store(x + i, first);
      store(x + half + i, second);
    }
    if (i < half) {
      const int rest = static_cast<int>(half - i);
      vf first = load_partial(x + i, rest), second = load_partial(x + half + i, rest);
      rotate(first, second, load_partial(cos + i, rest), load_partial(sin + i, rest));
      store_partial(x + i, first, rest);
      store_partial(x + half + i, second, rest);
    }
  }
}

int64_t rope(float* q, int64_t q_stride, float* k, int64_t k_stride, const int64_t* positions, const float* table,
             int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t table_rows) {
  for (int64_t t = 0; t < tokens; ++t)
    if (positions[t] < 0 || positions[t] >= table_rows) return t;
  const int64_t half = head_dim / 2, width = (heads + kv_heads) * head_dim;
  const int64_t each = width > 0 && width < kTaskFloats ? kTaskFloats / width : 1;
  parallel_for((tokens + each - 1) / each, [&](int64_t task) {
    const int64_t end = (task + 1) * each < tokens ? (task + 1) * each : tokens;
    for (int64_t t = task * each; t < end; ++t) {
      const float* cos = table + positions[t] * head_dim;
      rotate_heads(q + t * q_stride, heads, half, cos, cos + half);
      rotate_heads(k + t * k_stride, kv_heads, half, cos, cos + half);
    }
  });
  return -1;
}

}  // namespace

const RopeOps& rope_ops() {
  static const RopeOps ops = {rope};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
