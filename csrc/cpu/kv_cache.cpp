#include "cpu/kv_cache.h"

#include <cstring>

#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

constexpr int64_t kTaskFloats = 65536;  // below this a second thread costs more than it brings

int64_t first_outside(const int32_t* slots, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    if (slots[i] < low || slots[i] >= high) return i;
  return -1;
}

template <typename Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  const int64_t each = width > 0 && width < kTaskFloats ? kTaskFloats / width : 1;
  parallel_for((rows + each - 1) / each, [&](int64_t task) {
    const int64_t end = (task + 1) * each < rows ? (task + 1) * each : rows;
    for (int64_t r = task * each; r < end; ++r) row(r);
  });
}

int64_t write(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* k_cache, float* v_cache,
              const int32_t* slots, int64_t tokens, int64_t num_slots, int64_t width) {
  const int64_t bad = first_outside(slots, tokens, -1, num_slots);
  if (bad >= 0 || width == 0) return bad;
  const size_t bytes = static_cast<size_t>(width) * sizeof(float);
  for_rows(tokens, width, [&](int64_t t) {
    if (slots[t] < 0) return;
    std::memcpy(k_cache + slots[t] * width, k + t * k_stride, bytes);
    std::memcpy(v_cache + slots[t] * width, v + t * v_stride, bytes);
  });
  return -1;
}

int64_t gather(const float* cache, const int32_t* slots, float* out, int64_t count, int64_t num_slots, int64_t width) {
  const int64_t bad = first_outside(slots, count, 0, num_slots);
  if (bad >= 0 || width == 0) return bad;
  const size_t bytes = static_cast<size_t>(width) * sizeof(float);
  for_rows(count, width, [&](int64_t m) { std::memcpy(out + m * width, cache + slots[m] * width, bytes); });
  return -1;
}

}  // namespace

const KvCacheOps& kv_cache_ops() {
  static const KvCacheOps ops = {write, gather};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
