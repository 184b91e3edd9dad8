#include "cpu/ceiling.h"

#include "uma/simd.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int kChains = 12;  // enough independent sums to hide the latency of two units; they fit the registers

double fp32_fma(int64_t rounds, float* sink) {
  vf sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = splat(1.0f + i);
  vf a = splat(0.999f + *sink), b = splat(1e-3f);
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * a + b;
  vf total = {};
  for (int i = 0; i < kChains; ++i) total += sum[i];
  *sink = reduce_add(total) * 1e-30f;
  return 2.0 * kLanes * kChains * rounds;
}

#if defined(UMA_ISA_AVX512) || defined(UMA_ISA_AVX2)

// GCC would merge the sums of several rounds; the empty asm makes each of them happen.
#if defined(UMA_ISA_AVX512)
typedef __m512i vector_i;
#define UMA_I(name) _mm512_##name
#define UMA_KEEP(x) __asm__ volatile("" : "+v"(x))
#define UMA_ZERO _mm512_setzero_si512()
#else
typedef __m256i vector_i;
#define UMA_I(name) _mm256_##name
#define UMA_KEEP(x) __asm__ volatile("" : "+x"(x))
#define UMA_ZERO _mm256_setzero_si256()
#endif

template <typename Round>
double integer_rounds(int64_t rounds, float* sink, double operations, const Round& round) {
  vector_i sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = UMA_ZERO;
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      round(sum[i], n);
      UMA_KEEP(sum[i]);
    }
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) *sink += static_cast<float>(reinterpret_cast<vi>(sum[i])[0]) * 1e-30f;
  return operations * kChains * rounds;
}

double int16_madd(int64_t rounds, float* sink) {
  vector_i a = UMA_I(set1_epi16)(3), b = UMA_I(set1_epi16)(-5);
  return integer_rounds(rounds, sink, sizeof(vector_i), [&](vector_i& sum, int64_t) __attribute__((always_inline)) {
    UMA_KEEP(a);
    sum = UMA_I(add_epi32)(sum, UMA_I(madd_epi16)(a, b));
  });
}

double int8_madd(int64_t rounds, float* sink) {
  vector_i a = UMA_I(set1_epi8)(3), b = UMA_I(set1_epi8)(-5), ones = UMA_I(set1_epi16)(1);
  return integer_rounds(rounds, sink, 2 * sizeof(vector_i), [&](vector_i& sum, int64_t) __attribute__((always_inline)) {
    UMA_KEEP(a);
    sum = UMA_I(add_epi32)(sum, UMA_I(madd_epi16)(UMA_I(maddubs_epi16)(a, b), ones));
  });
}

double int4_madd(int64_t rounds, float* sink) {
  vector_i a = UMA_I(set1_epi8)(3), b = UMA_I(set1_epi8)(-5), ones = UMA_I(set1_epi16)(1);
  return integer_rounds(rounds, sink, 4 * 2 * sizeof(vector_i), [&](vector_i& sum, int64_t) __attribute__((always_inline)) {
    vector_i part = UMA_I(maddubs_epi16)(a, b);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      UMA_KEEP(a);
      part = UMA_I(add_epi16)(part, UMA_I(maddubs_epi16)(a, b));
    }
    sum = UMA_I(add_epi32)(sum, UMA_I(madd_epi16)(part, ones));
  });
}

#else

double int16_madd(int64_t, float*) { return 0; }
double int8_madd(int64_t, float*) { return 0; }
double int4_madd(int64_t, float*) { return 0; }

#endif

#if defined(UMA_ISA_AVX512)

#define UMA_VNNI __attribute__((target("avx512vnni")))

template <bool kBytes>
UMA_VNNI double vnni(int64_t rounds, float* sink) {
  if (!__builtin_cpu_supports("avx512vnni")) return 0;
  __m512i sum[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_si512();
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sum[i] = kBytes ? _mm512_dpbusd_epi32(sum[i], a, b) : _mm512_dpwssd_epi32(sum[i], a, b);
      UMA_KEEP(sum[i]);
    }
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) *sink += static_cast<float>(reinterpret_cast<vi>(sum[i])[0]) * 1e-30f;
  return 2.0 * (kBytes ? 64 : 32) * kChains * rounds;
}

double int16_vnni(int64_t rounds, float* sink) { return vnni<false>(rounds, sink); }
double int8_vnni(int64_t rounds, float* sink) { return vnni<true>(rounds, sink); }

#else

double int16_vnni(int64_t, float*) { return 0; }
double int8_vnni(int64_t, float*) { return 0; }

#endif

double read(const float* from, int64_t floats, float* sink) {
  vf sum[8] = {};
  const int64_t step = 8 * kLanes, end = floats / step * step;
  for (int64_t at = 0; at < end; at += step)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += load(from + at + i * kLanes);
  vf total = {};
  for (int i = 0; i < 8; ++i) total += sum[i];
  *sink = reduce_add(total);
  return 4.0 * end;
}

double copy(const float* from, float* to, int64_t floats) {
  const int64_t end = floats / kLanes * kLanes;
  for (int64_t at = 0; at < end; at += kLanes) {
#if defined(UMA_ISA_AVX512)
    _mm512_stream_ps(to + at, load(from + at));
#elif defined(UMA_ISA_AVX2)
    _mm256_stream_ps(to + at, load(from + at));
#else
    store(to + at, load(from + at));
#endif
  }
  return 8.0 * end;  // read and written
}

}  // namespace

const CeilingOps& ceiling_ops() {
  static const CeilingOps ops = {fp32_fma, int16_madd, int8_madd, int4_madd, int16_vnni, int8_vnni, read, copy};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
