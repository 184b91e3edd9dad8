// What attention does across and to the lanes of a vector. Knows vectors; does not know queries or keys.
#pragma once
#include "uma/simd.h"

namespace uma {
namespace UMA_ISA {

// Lanes a0 b0 a1 b1 .. of the lower and of the upper halves of a and b.
static inline void interleave(simd::vf& a, simd::vf& b) {
#if defined(UMA_ISA_AVX512)
  const simd::vf low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  b = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(UMA_ISA_AVX2)
  const simd::vf low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  b = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const simd::vf low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  b = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
  a = low;
}

// The larger of each pair of lanes; a lane of b where either is NaN.
static inline simd::vf larger(simd::vf a, simd::vf b) { return a > b ? a : b; }

// The largest lane, in every lane.
static inline simd::vf largest_lane(simd::vf v) {
  for (int n = 1; n < simd::kLanes; n *= 2) {
    simd::vf other = v;
    interleave(v, other);
    v = larger(v, other);
  }
  return v;
}

// e^x for x <= 0, by the polynomial of simd::exp; 0 below -87.3, exactly 1 for 0, NaN for NaN. On -87.3 .. 0 the error
// is at most 1.02 ulp of the result, with FMA and without, a relative 2^-23.5: found by comparing every float with fp64.
static inline simd::vf exp_nonpositive(simd::vf x) {
  using namespace simd;
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the low bits are x / ln 2, rounded
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vf scale = reinterpret_cast<vf>((reinterpret_cast<vi>(shifted) + (127 - 0x4b400000)) << 23);
  return x < -87.3f ? vf{} : p * scale;
}

// to[d * ldt + j] = rows[j][offset + d] for j < kLanes and d < dim.
static inline void transpose_rows(const float* const* rows, int64_t offset, int64_t dim, float* to, int64_t ldt) {
  using namespace simd;
  for (int64_t d = 0; d < dim;) {
    const int count = dim - d < kLanes ? static_cast<int>(dim - d) : kLanes;
#if defined(UMA_ISA_AVX2)
    if (count == kLanes) {  // halves of rows j and j + 4 side by side, then two shuffles inside the halves
      for (int half = 0; half < kLanes; half += 4) {
        __m256 x[4];
        for (int j = 0; j < 4; ++j)
          x[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[j] + offset + d + half)),
                                      _mm_loadu_ps(rows[j + 4] + offset + d + half), 1);
        const __m256 low01 = _mm256_unpacklo_ps(x[0], x[1]), high01 = _mm256_unpackhi_ps(x[0], x[1]);
        const __m256 low23 = _mm256_unpacklo_ps(x[2], x[3]), high23 = _mm256_unpackhi_ps(x[2], x[3]);
        float* column = to + (d + half) * ldt;
        _mm256_storeu_ps(column, _mm256_shuffle_ps(low01, low23, 0x44));
        _mm256_storeu_ps(column + ldt, _mm256_shuffle_ps(low01, low23, 0xee));
        _mm256_storeu_ps(column + 2 * ldt, _mm256_shuffle_ps(high01, high23, 0x44));
        _mm256_storeu_ps(column + 3 * ldt, _mm256_shuffle_ps(high01, high23, 0xee));
      }
      d += kLanes;
      continue;
    }
#endif
    vf x[kLanes];
    if (count == kLanes) {
      for (int j = 0; j < kLanes; ++j) x[j] = load(rows[j] + offset + d);
    } else {
      for (int j = 0; j < kLanes; ++j) x[j] = load_partial(rows[j] + offset + d, count);
    }
    // log2(kLanes) perfect shuffles of the kLanes^2 elements: each brings the last bit of a lane's number to the front.
    for (int stage = 1; stage < kLanes; stage *= 2) {
      vf y[kLanes];
      for (int j = 0; j < kLanes / 2; ++j) {
        y[2 * j] = x[j];
        y[2 * j + 1] = x[j + kLanes / 2];
        interleave(y[2 * j], y[2 * j + 1]);
      }
      for (int j = 0; j < kLanes; ++j) x[j] = y[j];
    }
    for (int j = 0; j < count; ++j) store(to + (d + j) * ldt, x[j]);
    d += count;
  }
}

}  // namespace UMA_ISA
}  // namespace uma
