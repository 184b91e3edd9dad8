// The inner loops of `topk`: a few corpus rows times a few queries, sums in registers.
//
// A score has one chain of vectors along the row and one way to fold it, whatever the tile it is computed in: its bits do not
// depend on how many queries or rows there are. Knows formats and registers; does not know selection or threads.
#pragma once
#include "cpu/topk.h"
#include "uma/simd.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

#define UMA_INLINE inline __attribute__((always_inline))

typedef float v4 __attribute__((vector_size(16)));
typedef float v4u __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t v4i __attribute__((vector_size(16)));

// The four quarters of a vector added: upper half to lower half, until four lanes are left.
template <typename Four, typename Vector>
static UMA_INLINE Four fold_to_four(Vector v) {
  if constexpr (sizeof(Vector) == 64) {
    auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (sizeof(Vector) == 32) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else {
    return v;
  }
}

// The sums of four vectors, transposed on the way.
template <typename Four, typename Vector>
static UMA_INLINE Four fold(Vector a, Vector b, Vector c, Vector d) {
  const Four fa = fold_to_four<Four>(a), fb = fold_to_four<Four>(b), fc = fold_to_four<Four>(c), fd = fold_to_four<Four>(d);
  const Four ab = __builtin_shufflevector(fa, fb, 0, 4, 1, 5) + __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(fc, fd, 0, 4, 1, 5) + __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

static UMA_INLINE vf halves_to_float(const uint16_t* p) {
#if defined(UMA_ISA_AVX512)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(UMA_ISA_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and fraction moved into place are the value times 2^-112, subnormal halves included.
  vi bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = p[i];
  const vf magnitude = reinterpret_cast<vf>((bits & 0x7fff) << 13) * 0x1p112f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(magnitude) | (bits & 0x8000) << 16);
#endif
}

// 2 * kLanes values of 16 bits, in pairs.
static UMA_INLINE vi bytes_to_pairs(const int8_t* p) {
#if defined(UMA_ISA_AVX512)
  return reinterpret_cast<vi>(_mm512_maskz_cvtepi8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(UMA_ISA_AVX2)
  return reinterpret_cast<vi>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vi pairs;
  for (int i = 0; i < kLanes; ++i) pairs[i] = (p[2 * i] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(p[2 * i + 1]) << 16);
  return pairs;
#endif
}

// sum + low * low + high * high in each lane, exact.
static UMA_INLINE vi add_pair_products(vi sum, vi a, vi b) {
#if defined(UMA_ISA_AVX512)
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(UMA_ISA_AVX2)
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// A format says how a row's elements come into a vector, kStep at a time. `Wide` is the format that a query has, too.
struct Fp32Rows {
  using Wide = Fp32Rows;
  using Element = float;
  using Vector = vf;
  static constexpr int kStep = kLanes, kBytes = 4;
  static UMA_INLINE vf load_row(const uint8_t* p, int64_t i) { return load(reinterpret_cast<const float*>(p) + i); }
  static UMA_INLINE vf add(vf sum, vf a, vf b) { return sum + a * b; }
  static UMA_INLINE v4 finish(vf a, vf b, vf c, vf d) { return fold<v4>(a, b, c, d); }
};

struct Fp16Rows : Fp32Rows {
  static constexpr int kBytes = 2;
  static UMA_INLINE vf load_row(const uint8_t* p, int64_t i) { return halves_to_float(reinterpret_cast<const uint16_t*>(p) + i); }
};

struct Int16Rows {
  using Wide = Int16Rows;
  using Element = int16_t;
  using Vector = vi;
  static constexpr int kStep = 2 * kLanes, kBytes = 2;
  static UMA_INLINE vi load_row(const uint8_t* p, int64_t i) { return *reinterpret_cast<const viu*>(p + 2 * i); }
  static UMA_INLINE vi add(vi sum, vi a, vi b) { return add_pair_products(sum, a, b); }
  static UMA_INLINE v4 finish(vi a, vi b, vi c, vi d) { return __builtin_convertvector(fold<v4i>(a, b, c, d), v4); }
};

struct Int8Rows : Int16Rows {
  static constexpr int kBytes = 1;
  static UMA_INLINE vi load_row(const uint8_t* p, int64_t i) { return bytes_to_pairs(reinterpret_cast<const int8_t*>(p) + i); }
};

template <typename Vector>
static UMA_INLINE Vector load_wide(const uint8_t* p) {
  return reinterpret_cast<Vector>(*reinterpret_cast<const viu*>(p));
}

static UMA_INLINE void store_scores(v4 scores, const float* row_scales, float query_scale, float* out) {
  if (row_scales) scores = scores * *reinterpret_cast<const v4u*>(row_scales) * query_scale;
  *reinterpret_cast<v4u*>(out) = scores;
}

constexpr int kQuad = 4;   // rows of a tile
constexpr int kPanel = 3;  // queries of a wide tile: 12 sums, 3 queries and a row fill 16 registers
constexpr int kAhead = 8;  // rows: how far ahead memory is asked for

// One query and four rows as they lie in memory; rows[kAhead ..] will be needed soon.
// `query` holds vectors of the wide format. out[r] = rows[r] . query, times both scales where there are any.
template <class Format>
static UMA_INLINE void direct_tile(const uint8_t* const* rows, const float* row_scales, const uint8_t* query, float query_scale,
                                   int64_t stride, float* out) {
  using Vector = typename Format::Vector;
  Vector sums[kQuad] = {};
  constexpr int kLine = 64 / Format::kBytes > Format::kStep ? 64 / Format::kBytes : Format::kStep;  // elements of a cache line
  for (int64_t i = 0; i < stride; i += kLine) {
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r) __builtin_prefetch(rows[kAhead + r] + i * Format::kBytes);
#pragma GCC unroll 8
    for (int at = 0; at < kLine; at += Format::kStep) {
      const Vector q = load_wide<Vector>(query + (i + at) * sizeof(typename Format::Element));
#pragma GCC unroll 4
      for (int r = 0; r < kQuad; ++r) sums[r] = Format::add(sums[r], Format::load_row(rows[r], i + at), q);
    }
  }
  store_scores(Format::finish(sums[0], sums[1], sums[2], sums[3]), row_scales, query_scale, out);
}

// Four rows and three queries, each interleaved by vectors: rows [steps][4], panel [steps][3].
// out[q * ld + r] for the first `valid` queries. query_scales: null where there are none.
template <class Wide>
static UMA_INLINE void wide_tile(const uint8_t* rows, const float* row_scales, const uint8_t* panel, const float* query_scales,
                                 int64_t steps, int64_t valid, float* out, int64_t ld) {
  using Vector = typename Wide::Vector;
  Vector sums[kQuad][kPanel] = {};
  for (int64_t i = 0; i < steps; ++i) {
    Vector q[kPanel];
#pragma GCC unroll 3
    for (int j = 0; j < kPanel; ++j) q[j] = load_wide<Vector>(panel + (i * kPanel + j) * sizeof(Vector));
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r) {
      const Vector v = load_wide<Vector>(rows + (i * kQuad + r) * sizeof(Vector));
#pragma GCC unroll 3
      for (int j = 0; j < kPanel; ++j) sums[r][j] = Wide::add(sums[r][j], v, q[j]);
    }
  }
#pragma GCC unroll 3
  for (int j = 0; j < kPanel; ++j)
    if (j < valid)
      store_scores(Wide::finish(sums[0][j], sums[1][j], sums[2][j], sums[3][j]), row_scales, query_scales ? query_scales[j] : 1.0f,
                   out + j * ld);
}

// Four rows as a wide tile takes them.
template <class Format>
static UMA_INLINE void interleave(const uint8_t* const* rows, int64_t stride, uint8_t* to) {
  for (int64_t i = 0; i < stride; i += Format::kStep)
#pragma GCC unroll 4
    for (int r = 0; r < kQuad; ++r, to += sizeof(vi))
      *reinterpret_cast<viu*>(to) = reinterpret_cast<vi>(Format::load_row(rows[r], i));
}

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
