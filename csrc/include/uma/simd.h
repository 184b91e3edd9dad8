// One vector of floats at the width of the instruction set this file is compiled for.
//
// Every source in csrc/cpu is compiled once per instruction set (UMA_ISA = portable, avx2, avx512) into a namespace of
// that name; the same code then uses 4, 8 or 16 lanes. GCC's and Clang's vector extensions give the arithmetic
// operators; a multiply followed by an add contracts to one FMA where the machine has it (-ffp-contract=fast).
// Everything here is `static inline` inside the namespace: no symbol compiled for AVX-512 may be shared with the portable build.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(UMA_ISA_AVX2) || defined(UMA_ISA_AVX512)
#include <immintrin.h>
#endif

#ifndef UMA_ISA
#error "csrc/cpu sources are compiled with -DUMA_ISA=<name>"
#endif

namespace uma {
namespace UMA_ISA {
namespace simd {

#if defined(UMA_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(UMA_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
// Unaligned, may-alias twins: dereferencing one is an unaligned load or store.
typedef float vfu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vhu __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint8_t vbu __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef int8_t vcu __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Floats of 16 bits, in memory alone: reading them loses nothing.
struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

static inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
static inline vf splat(float x) { return x - vf{}; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
static inline vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // toward zero
#if defined(UMA_ISA_AVX512)
static inline vf load(const fp16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vf load(const bf16* p) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<vf>(reinterpret_cast<vi>(bits) << 16);
}
#elif defined(UMA_ISA_AVX2)
static inline vf load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline vf load(const bf16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<vf>(reinterpret_cast<vi>(bits) << 16);
}
#else
static inline vf load(const fp16* p) {
  const vi bits = __builtin_convertvector(*reinterpret_cast<const vhu*>(p), vi);
  const vi magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  vi value = reinterpret_cast<vi>(reinterpret_cast<vf>(magnitude) * 0x1p112f);  // the exponent's bias; subnormals become normal
  value |= (magnitude >= 0x7c00 << 13) & 0x7f800000;                            // infinity and NaN
  return reinterpret_cast<vf>(value | sign);
}
static inline vf load(const bf16* p) {
  return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vhu*>(p), vi) << 16);
}
#endif
static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }  // lanes of a where mask is all ones, else of b
static inline vf max(vf a, vf b) { return a > b ? a : b; }              // b where either is NaN
static inline vf min(vf a, vf b) { return a < b ? a : b; }

// First n lanes from memory, the rest zero (n < kLanes); and the store of the first n.
static inline vf load_partial(const float* p, int n) {
  float t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
static inline void store_partial(float* p, vf v, int n) {
  float t[kLanes];
  store(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

// Horizontal reductions in one fixed order (halves folded), the same for every call.
static inline float reduce_add(vf v) {
  float t[kLanes];
  store(t, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}
static inline float reduce_max(vf v) {
  float t[kLanes];
  store(t, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i] > t[i + width] ? t[i] : t[i + width];
  return t[0];
}

// e^x for x <= 88: 2^n * p(r) with n = round(x / ln 2), |r| <= ln(2)/2 and a degree-6 polynomial (Cephes' expf
// coefficients, netlib.org/cephes). Relative error below 2^-22 on [-87, 88]; 0 below -87.3; -inf gives 0,
// NaN stays NaN.
static inline vf exp(vf x) {
  const vi underflow = x < splat(-87.3f);
  x = max(splat(-87.3f), x);
  x = min(splat(88.3f), x);
  const vf scaled = x * 1.44269504088896341f;
  const vf half = select(scaled < vf{}, splat(-0.5f), splat(0.5f));
  const vi n = to_int(scaled + half);
  const vf nf = to_float(n);
  vf r = x - nf * 0.693359375f;
  r = r + nf * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vf scale = reinterpret_cast<vf>((n + 127) << 23);
  return select(underflow, vf{}, p * scale);
}

}  // namespace simd
}  // namespace UMA_ISA
}  // namespace uma
