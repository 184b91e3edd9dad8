// Late interaction. Sixteen (AVX2) query tokens lie across the lanes of two vectors, packed with k outermost: a product of a
// document token with all of them is a broadcast and two FMAs, and the largest is kept lane by lane.
//
// A product has one chain of FMAs along k, whatever else is computed with it.
#include <algorithm>

#include "cpu/topk.h"
#include "uma/scratch.h"
#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

#if defined(UMA_ISA_AVX512)
constexpr int kTokens = 8;  // of a document in a tile
#elif defined(UMA_ISA_AVX2)
constexpr int kTokens = 6;
#else
constexpr int kTokens = 4;
#endif
constexpr int kPanel = 2 * kLanes;  // query tokens side by side
constexpr float kInfinity = __builtin_inff();

// best = max(best, panel^T . token) for kTokens tokens.
inline __attribute__((always_inline)) void tile(const float* const* tokens, const float* panel, int64_t width, vf& best0, vf& best1) {
  vf sums[kTokens][2] = {};
  const float* row[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) row[t] = tokens[t];
  for (int64_t i = 0; i < width; ++i) {
    const vf a = load(panel + i * kPanel), b = load(panel + i * kPanel + kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const vf x = splat(row[t][i]);
      sums[t][0] += x * a;
      sums[t][1] += x * b;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    best0 = max(sums[t][0], best0);
    best1 = max(sums[t][1], best1);
  }
}

float zero_or_nan(const float* values, int64_t count) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] += load(values + i + j * kLanes) * 0.0f;
  float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += values[i] * 0.0f;
  return sum;
}

}  // namespace

void maxsim(const float* queries, const int64_t* query_ends, int64_t num_queries, const float* docs, const int64_t* doc_ends,
            int64_t num_docs, int64_t width, float* out) {
  if (num_queries == 0 || num_docs == 0) return;
  const int64_t tokens = query_ends[num_queries], panels = (tokens + kPanel - 1) / kPanel;
  Scratch memory;
  float* packed = memory.floats(std::max<int64_t>(1, panels * kPanel * width));
  for (int64_t t = 0; t < panels * kPanel; ++t)
    for (int64_t i = 0; i < width; ++i)
      packed[t / kPanel * kPanel * width + i * kPanel + t % kPanel] = t < tokens ? queries[t * width + i] : 0.0f;
  parallel_for(num_docs, [&](int64_t d) {
    static thread_local Scratch best_memory;
    float* best = best_memory.floats(panels * kPanel);
    const int64_t begin = doc_ends[d], end = doc_ends[d + 1];
    // NaN where a value is not finite, else 0: the maxima pass over NaN.
    const float poison = zero_or_nan(docs + begin * width, (end - begin) * width);
    for (int64_t p = 0; p < panels; ++p) {
      vf best0 = splat(-kInfinity), best1 = best0;
      for (int64_t at = begin; at < end; at += kTokens) {
        const float* rows[kTokens];
        for (int t = 0; t < kTokens; ++t) rows[t] = docs + std::min<int64_t>(at + t, end - 1) * width;
        if (p == 0)  // tokens are short: the machine's own prefetcher hardly gets going
          for (int64_t i = 0; i < kTokens * width; i += 16) __builtin_prefetch(docs + (at + 2 * kTokens) * width + i);
        tile(rows, packed + p * kPanel * width, width, best0, best1);
      }
      store(best + p * kPanel, best0);
      store(best + p * kPanel + kLanes, best1);
    }
    for (int64_t q = 0; q < num_queries; ++q) {
      float sum = poison;
      for (int64_t t = query_ends[q]; t < query_ends[q + 1]; ++t) sum += best[t];
      out[q * num_docs + d] = sum;
    }
  });
}

}  // namespace UMA_ISA
}  // namespace uma
