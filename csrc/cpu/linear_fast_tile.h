// The inner loops of `fast` products (linear_fast.h): blocks of x in 8 bits times a panel's quants, sums in registers.
//
// Four neighbours in k travel as one 32-bit lane, a quad, the first in its lowest byte. 4-bit quants need no more than 16
// bits to sum over a block: 15 * 127 * 2 products * 8 quads < 2^15, so a multiplication and an addition do for four k, and
// sums widen once a block. 8-bit quants are multiplied as |w| times x with the sign of w: 2 * 128 * 127 < 2^15.
// Rows of x lie as [blocks][rows][quads of a block] with their parameters as [blocks][3][rows]: scale_x, scale_x * sum, and
// -128 * sum as an integer (the sum of the integers; scale_x * sum has the block's outlier added).
// Knows layouts and registers; does not know threads or how work is divided.
#pragma once
#include <type_traits>

#include "cpu/linear_tile.h"

#if !defined(UMA_ISA_AVX2) && !defined(UMA_ISA_AVX512) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace uma {
namespace UMA_ISA {
namespace {

// Rows of the largest tile. Its integer sums stay in registers; those in fp32 are touched once a block and wait in memory.
#if defined(UMA_ISA_AVX512)
constexpr int kFastRows = 8;
#else
constexpr int kFastRows = 6;
#endif
constexpr int kFastParameters = 3;  // of one row's block

// The one value of a block that is far larger than the others; it is multiplied apart.
struct Outlier {
  float x;
  int32_t block;
  int32_t place;  // in the block
};
constexpr int kFastVecs = 2;    // vectors of a panel that a tile takes at a time
constexpr int kDirectRows = 2;  // rows for which a weight is unpacked in registers, a whole panel side by side

static UMA_INLINE vi load_quads(const int32_t* p) { return *reinterpret_cast<const viu*>(p); }

// Keeps a sum where it is: GCC would gather the products of many steps first, and run out of registers.
static UMA_INLINE vi pinned(vi v) {
#if defined(UMA_ISA_AVX512)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// A vector of a panel's quads, and what multiplying by it needs.
struct QuadWeights {
  vi quads;
  vi magnitudes;  // 8-bit quants without VNNI: |w|
};

template <bool kVnni, int kBits>
static UMA_INLINE QuadWeights quad_weights(vi quads) {
#if defined(UMA_ISA_AVX512)
  if constexpr (kBits == 8 && !kVnni) return {quads, reinterpret_cast<vi>(_mm512_maskz_abs_epi8(~0ull, reinterpret_cast<__m512i>(quads)))};
#elif defined(UMA_ISA_AVX2)
  if constexpr (kBits == 8 && !kVnni) return {quads, reinterpret_cast<vi>(_mm256_abs_epi8(reinterpret_cast<__m256i>(quads)))};
#endif
  if constexpr (kBits == 8 && kVnni) return {quads ^ static_cast<int32_t>(0x80808080), quads};  // w + 128, without a sign
  return {quads, quads};
}

// sum + products of the quads; what `sum` is, only `whole_sum` knows. The VNNI forms are written out, since intrinsics would
// need every function around them compiled for that extension.
template <bool kVnni, int kBits>
static UMA_INLINE vi add_products(vi sum, const QuadWeights& weights, vi x) {
#if defined(UMA_ISA_AVX512)
  const __m512i w = reinterpret_cast<__m512i>(weights.quads), xs = reinterpret_cast<__m512i>(x);
  if constexpr (kVnni) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights.quads), "v"(x));
    return sum;
  } else if constexpr (kBits == 4) {
    return pinned(reinterpret_cast<vi>(_mm512_add_epi16(reinterpret_cast<__m512i>(sum), _mm512_maddubs_epi16(w, xs))));
  } else {
    const __m512i signed_x = _mm512_mask_sub_epi8(xs, _mm512_movepi8_mask(w), _mm512_setzero_si512(), xs);
    const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(weights.magnitudes), signed_x);
    return pinned(sum + reinterpret_cast<vi>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
  }
#elif defined(UMA_ISA_AVX2)
  const __m256i w = reinterpret_cast<__m256i>(weights.quads), xs = reinterpret_cast<__m256i>(x);
  if constexpr (kVnni) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights.quads), "x"(x));
    return sum;
  } else if constexpr (kBits == 4) {
    return pinned(reinterpret_cast<vi>(_mm256_add_epi16(reinterpret_cast<__m256i>(sum), _mm256_maddubs_epi16(w, xs))));
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weights.magnitudes), _mm256_sign_epi8(xs, w));
    return pinned(sum + reinterpret_cast<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
#elif defined(__SSE2__)
  // Bytes 0 and 2 of each lane, then 1 and 3, as 16 bits with their signs.
  const __m128i w = reinterpret_cast<__m128i>(weights.quads), xs = reinterpret_cast<__m128i>(x);
  const auto even = [](__m128i v) __attribute__((always_inline)) { return _mm_srai_epi16(_mm_slli_epi16(v, 8), 8); };
  sum += reinterpret_cast<vi>(_mm_madd_epi16(even(w), even(xs)));
  return pinned(sum + reinterpret_cast<vi>(_mm_madd_epi16(_mm_srai_epi16(w, 8), _mm_srai_epi16(xs, 8))));
#else
  const vi w = weights.quads;
  sum += (w << 24 >> 24) * (x << 24 >> 24) + (w << 16 >> 24) * (x << 16 >> 24);
  return sum + (w << 8 >> 24) * (x << 8 >> 24) + (w >> 24) * (x >> 24);
#endif
}

// The sum of a block's products.
template <bool kVnni, int kBits>
static UMA_INLINE vi whole_sum(vi sum) {
#if defined(UMA_ISA_AVX512)
  if constexpr (kBits == 4 && !kVnni)
    return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(sum), _mm512_set1_epi16(1)));
#elif defined(UMA_ISA_AVX2)
  if constexpr (kBits == 4 && !kVnni)
    return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(sum), _mm256_set1_epi16(1)));
#endif
  return sum;
}

// The quads of a whole panel at four k; `row` is where its quants of the first of them lie.
struct PanelQuads {
  vi v[kVecs];
};

template <int kBits>
static UMA_INLINE PanelQuads panel_quads(const uint8_t* row) {
  PanelQuads out;
#if defined(UMA_ISA_AVX2) || defined(UMA_ISA_AVX512)
  __m256i quads[4];  // of 8 columns each
  if constexpr (kBits == 4) {
    __m128i k[4];
    UMA_UNROLL for (int i = 0; i < 4; ++i) k[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * i));
    const __m128i low01 = _mm_unpacklo_epi8(k[0], k[1]), low23 = _mm_unpacklo_epi8(k[2], k[3]);
    const __m128i high01 = _mm_unpackhi_epi8(k[0], k[1]), high23 = _mm_unpackhi_epi8(k[2], k[3]);
    const __m256i first = _mm256_set_m128i(_mm_unpackhi_epi16(low01, low23), _mm_unpacklo_epi16(low01, low23));
    const __m256i second = _mm256_set_m128i(_mm_unpackhi_epi16(high01, high23), _mm_unpacklo_epi16(high01, high23));
    const __m256i nibble = _mm256_set1_epi8(15);
    quads[0] = _mm256_and_si256(first, nibble);
    quads[1] = _mm256_and_si256(second, nibble);
    quads[2] = _mm256_and_si256(_mm256_srli_epi16(first, 4), nibble);
    quads[3] = _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble);
  } else {
    __m256i k[4];
    UMA_UNROLL for (int i = 0; i < 4; ++i) k[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * i));
    const __m256i low01 = _mm256_unpacklo_epi8(k[0], k[1]), low23 = _mm256_unpacklo_epi8(k[2], k[3]);
    const __m256i high01 = _mm256_unpackhi_epi8(k[0], k[1]), high23 = _mm256_unpackhi_epi8(k[2], k[3]);
    const __m256i a = _mm256_unpacklo_epi16(low01, low23), b = _mm256_unpackhi_epi16(low01, low23);
    const __m256i c = _mm256_unpacklo_epi16(high01, high23), d = _mm256_unpackhi_epi16(high01, high23);
    quads[0] = _mm256_permute2x128_si256(a, b, 0x20);
    quads[1] = _mm256_permute2x128_si256(c, d, 0x20);
    quads[2] = _mm256_permute2x128_si256(a, b, 0x31);
    quads[3] = _mm256_permute2x128_si256(c, d, 0x31);
  }
#if defined(UMA_ISA_AVX512)
  UMA_UNROLL for (int v = 0; v < kVecs; ++v)
    out.v[v] = reinterpret_cast<vi>(
        _mm512_maskz_inserti64x4(0xff, _mm512_maskz_broadcast_i64x4(0xff, quads[2 * v]), quads[2 * v + 1], 1));
#else
  UMA_UNROLL for (int v = 0; v < kVecs; ++v) out.v[v] = reinterpret_cast<vi>(quads[v]);
#endif
#else
  uint8_t bytes[kPanel * 4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < kPanel; ++j)
      bytes[4 * j + i] = kBits == 8 ? row[i * kPanel + j] : j < 16 ? row[i * 16 + j] & 15 : row[i * 16 + j - 16] >> 4;
  std::memcpy(&out, bytes, sizeof out);
#endif
  return out;
}

// One tile's work: kRows rows of x times a panel, over `blocks` blocks.
struct FastStep {
  const int32_t* x;         // the first block's quads
  const float* x_scales;    // and parameters
  const uint8_t* panel;     // the first block of the panel, at the parameters of its column 0
  int64_t block_bytes;
  const int32_t* unpacked;  // the panel's quads, [quads of all blocks][32]; null: they are taken from `panel`
  int64_t blocks;
  bool mins;
  bool add;                 // `out` holds the sum of the blocks before these
  const float* bias;        // of the panel's columns; null: none, or these are not the last blocks
  float* out;               // row 0, from the panel's first column on; row r lies r * ldo further
  int64_t ldo, columns;     // columns: from there to the row's end
};

static __attribute__((noinline, unused)) void copy_sums(const float* from, float* to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = from[j];
}

// The columns of a panel from `column` on, kV vectors of them. kDirect: the weights come from the packed panel, kV is all of it.
template <bool kVnni, int kBits, int kSize, bool kDirect, int kRows, int kV>
static UMA_INLINE void fast_columns(const FastStep& step, int column) {
  static_assert(!kDirect || kV == kVecs);
  constexpr int kQuads = kSize / 4;
  float* out = step.out + column;
  const int64_t columns = step.columns - column;
  vf sums[kRows][kV] = {};
  if (step.add) {
    UMA_UNROLL for (int r = 0; r < kRows; ++r) {
      const float* from = out + r * step.ldo;
      float row[kV * kLanes] = {};
      if (columns < kV * kLanes) copy_sums(from, row, columns), from = row;
      UMA_UNROLL for (int v = 0; v < kV; ++v) sums[r][v] = load(from + v * kLanes);
    }
  }
  const int32_t* x = step.x;
  const float* x_scales = step.x_scales;
  const int32_t* unpacked = step.unpacked + column;
  const uint8_t* panel = step.panel;
  const int head = step.mins ? 256 : 128;
  for (int64_t block = 0; block < step.blocks; ++block) {
    if constexpr (kDirect) prefetch_ahead(panel, step.block_bytes);
    vi dots[kRows][kV] = {};
    if constexpr (kBits == 8 && kVnni) {  // its quants are multiplied as w + 128
      UMA_UNROLL for (int r = 0; r < kRows; ++r)
        UMA_UNROLL for (int v = 0; v < kV; ++v) dots[r][v] = splat_word(x_scales + 2 * kRows + r);
    }
    UMA_UNROLL for (int quad = 0; quad < kQuads; ++quad) {
      QuadWeights weights[kV];
      if constexpr (kDirect) {
        const PanelQuads quads = panel_quads<kBits>(panel + head + quad * 4 * kPanel * kBits / 8);
        UMA_UNROLL for (int v = 0; v < kV; ++v) weights[v] = quad_weights<kVnni, kBits>(quads.v[v]);
      } else {
        UMA_UNROLL for (int v = 0; v < kV; ++v)
          weights[v] = quad_weights<kVnni, kBits>(load_quads(unpacked + quad * kPanel + v * kLanes));
      }
      UMA_UNROLL for (int r = 0; r < kRows; ++r) {
        const vi quads = splat_word(x + r * kQuads + quad);
        UMA_UNROLL for (int v = 0; v < kV; ++v) dots[r][v] = add_products<kVnni, kBits>(dots[r][v], weights[v], quads);
      }
    }
    const float* parameters = reinterpret_cast<const float*>(panel) + column;
    // Two copies, as a sum should be fetched and put back once. The empty asm keeps what they share from being computed
    // before the branch, where it would push sums out of the registers.
    const auto fold = [&](auto mins) __attribute__((always_inline)) {
      __asm__ volatile("" ::: "memory");
      UMA_UNROLL for (int v = 0; v < kV; ++v) {
        const vf scale = load(parameters + v * kLanes);
        UMA_UNROLL for (int r = 0; r < kRows; ++r) {
          vf sum = sums[r][v] + to_float(whole_sum<kVnni, kBits>(dots[r][v])) * (splat(x_scales[r]) * scale);
          if constexpr (decltype(mins)::value) sum += splat(x_scales[kRows + r]) * load(parameters + kPanel + v * kLanes);
          sums[r][v] = sum;
        }
      }
    };
    step.mins ? fold(std::true_type()) : fold(std::false_type());
    x += kRows * kQuads;
    x_scales += kRows * kFastParameters;
    unpacked += kDirect ? 0 : kQuads * kPanel;
    panel += step.block_bytes;
  }
  UMA_UNROLL for (int r = 0; r < kRows; ++r)
    finish_row<kV>(sums[r], out + r * step.ldo, columns, Finish{false, step.bias ? step.bias + column : nullptr});
}

template <bool kVnni, int kBits, int kSize, bool kDirect, int kRows>
static void fast_tile(const FastStep& step) {
  constexpr int kV = kDirect ? kVecs : kFastVecs;
  for (int column = 0; column < kPanel && column < step.columns; column += kV * kLanes)
    fast_columns<kVnni, kBits, kSize, kDirect, kRows, kV>(step, column);
}

// to[quad][32] = the quads of `blocks` blocks of a panel.
template <int kBits>
static void unpack_quads(const uint8_t* panel, int64_t block_bytes, int64_t blocks, int quads, bool mins, int32_t* to) {
  for (int64_t block = 0; block < blocks; ++block, panel += block_bytes) {
    const uint8_t* quants = panel + (mins ? 256 : 128);
    for (int quad = 0; quad < quads; ++quad, quants += 4 * kPanel * kBits / 8, to += kPanel) {
      const PanelQuads unpacked = panel_quads<kBits>(quants);
      UMA_UNROLL for (int v = 0; v < kVecs; ++v) *reinterpret_cast<viu*>(to + v * kLanes) = unpacked.v[v];
    }
  }
}

// The bit patterns of a block's two largest magnitudes. They are ordered as the values are, NaN on top.
struct TopTwo {
  int32_t first, second;
};

template <int kSize>
static UMA_INLINE TopTwo top_two(const float* x) {
#if defined(UMA_ISA_AVX2) || defined(UMA_ISA_AVX512)
  const auto magnitudes = [&](int i) __attribute__((always_inline)) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  };
  const __m256i a = magnitudes(0), b = magnitudes(8);
  __m256i first = _mm256_max_epi32(a, b), second = _mm256_min_epi32(a, b);
  if constexpr (kSize == 32) {
    const __m256i c = magnitudes(16), d = magnitudes(24), larger = _mm256_max_epi32(c, d);
    second = _mm256_max_epi32(_mm256_max_epi32(second, _mm256_min_epi32(c, d)), _mm256_min_epi32(first, larger));
    first = _mm256_max_epi32(first, larger);
  }
  __m128i f = _mm256_castsi256_si128(first), s = _mm256_castsi256_si128(second);
  const auto meet = [&](__m128i other_f, __m128i other_s) __attribute__((always_inline)) {
    s = _mm_max_epi32(_mm_max_epi32(s, other_s), _mm_min_epi32(f, other_f));
    f = _mm_max_epi32(f, other_f);
  };
  meet(_mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1));
  meet(_mm_shuffle_epi32(f, 0x4e), _mm_shuffle_epi32(s, 0x4e));
  meet(_mm_shuffle_epi32(f, 0xb1), _mm_shuffle_epi32(s, 0xb1));
  return {_mm_cvtsi128_si32(f), _mm_cvtsi128_si32(s)};
#else
  TopTwo top{0, 0};
  for (int i = 0; i < kSize; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    const int32_t smaller = bits < top.first ? bits : top.first;
    top.second = smaller > top.second ? smaller : top.second;
    top.first = bits > top.first ? bits : top.first;
  }
  return top;
#endif
}

// to[i] = x[i] * factor, rounded to an integer, ties to even; 0 where the magnitude of x is `apart`. Returns the integers' sum
// and sets `place` to the lowest one where the magnitude is `top`.
template <int kSize>
static UMA_INLINE int32_t round_block(const float* x, float factor, int32_t apart, int32_t top, int8_t* to, int32_t* place) {
#if defined(UMA_ISA_AVX2) || defined(UMA_ISA_AVX512)
  const __m256 scale = _mm256_set1_ps(factor);
  const __m256i magnitude_apart = _mm256_set1_epi32(apart), magnitude_top = _mm256_set1_epi32(top);
  __m256i integers[4] = {}, tops[4] = {};
  UMA_UNROLL for (int i = 0; i < kSize / 8; ++i) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
    const __m256i magnitude = _mm256_and_si256(value, _mm256_set1_epi32(0x7fffffff));
    const __m256i kept = _mm256_andnot_si256(_mm256_cmpeq_epi32(magnitude, magnitude_apart), value);
    integers[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(kept), scale));
    tops[i] = _mm256_cmpeq_epi32(magnitude, magnitude_top);
  }
  // Packing works within halves of 128 bits, so four bytes each of x 0, 2, 4, 6 come first, then those of x 1, 3, 5, 7.
  const auto bytes = [](__m256i low, __m256i high) __attribute__((always_inline)) {
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  };
  const __m256i low = _mm256_packs_epi32(integers[0], integers[1]), high = _mm256_packs_epi32(integers[2], integers[3]);
  if constexpr (kSize == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes(low, high));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes(low, high)));
  }
  const __m256i at_top = bytes(_mm256_packs_epi32(tops[0], tops[1]), _mm256_packs_epi32(tops[2], tops[3]));
  *place = __builtin_ctz(static_cast<unsigned>(_mm256_movemask_epi8(at_top)));
  const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
  __m128i total = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1)));
#else
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
  constexpr float kMagic = 12582912.0f;
  constexpr int32_t kMagicBits = 0x4b400000;
  int32_t sum = 0;
  *place = -1;
  for (int i = 0; i < kSize; i += kLanes) {
    const vi bits = reinterpret_cast<vi>(load(x + i)), magnitude = bits & 0x7fffffff;
    const vf kept = reinterpret_cast<vf>(bits & (magnitude != apart));
    const vi integers = reinterpret_cast<vi>(rounded(kept * factor) + kMagic) - kMagicBits;
    for (int j = 0; j < kLanes; ++j) {
      sum += integers[j];
      to[i + j] = static_cast<int8_t>(integers[j]);
      if (*place < 0 && magnitude[j] == top) *place = i + j;
    }
  }
  return sum;
#endif
}

// One block of one row: its quads, and its parameters at parameters[0], [rows] and [2 * rows]. True if it has an outlier.
template <int kSize>
static UMA_INLINE bool quantize_block_8(const float* x, int8_t* to, float* parameters, int64_t rows, Outlier* outlier) {
  constexpr int32_t kInfinity = 0x7f800000, kSmallest = 0x12800000;  // the bits of infinity and of 2^-90
  const TopTwo top = top_two<kSize>(x);
  if (top.first < kSmallest || top.first >= kInfinity) {
    std::memset(to, 0, kSize);
    parameters[0] = parameters[rows] = top.first < kSmallest ? 0.0f : __builtin_nanf("");
    parameters[2 * rows] = 0.0f;
    return false;
  }
  float first, second;
  std::memcpy(&first, &top.first, sizeof first);
  std::memcpy(&second, &top.second, sizeof second);
  const bool apart = first * 0.5f >= second;
  const float largest = !apart ? first : top.second < kSmallest ? 0.0f : second;
  const float factor = largest == 0.0f ? 0.0f : 127.0f / largest;
  const int32_t sum = round_block<kSize>(x, factor, apart ? top.first : -1, top.first, to, &outlier->place);
  const int32_t excess = -128 * sum;
  outlier->x = apart ? x[outlier->place] : 0.0f;
  parameters[0] = largest / 127.0f;
  parameters[rows] = parameters[0] * static_cast<float>(sum) + outlier->x;
  std::memcpy(parameters + 2 * rows, &excess, sizeof excess);
  return apart;
}

// `rows` rows of x, k floats each, as a tile reads them. A row's outliers go to outliers[r * (blocks of a row)] and on.
template <int kSize>
static void quantize_rows_8(const float* x, int64_t rows, int64_t k, int32_t* quads, float* parameters, Outlier* outliers,
                            int32_t* counts) {
  const int64_t blocks = k / kSize;
  for (int64_t r = 0; r < rows; ++r, outliers += blocks) {
    int32_t count = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      outliers[count].block = static_cast<int32_t>(block);
      count += quantize_block_8<kSize>(x + r * k + block * kSize, reinterpret_cast<int8_t*>(quads + (block * rows + r) * (kSize / 4)),
                                       parameters + kFastParameters * block * rows + r, rows, outliers + count);
    }
    counts[r] = count;
  }
}

// out[0 .. columns - 1] = the products of a row's outliers with a panel.
template <int kBits>
static __attribute__((noinline)) void outlier_sums(const Outlier* outliers, int32_t count, const uint8_t* panel,
                                                   int64_t block_bytes, bool mins, float* out, int64_t columns) {
  vf sums[kVecs] = {};
  for (int32_t i = 0; i < count; ++i) {
    const uint8_t* block = panel + outliers[i].block * block_bytes;
    const uint8_t* row = block + (mins ? 256 : 128) + outliers[i].place * (kPanel * kBits / 8);
    const vf x = splat(outliers[i].x);
    UMA_UNROLL for (int v = 0; v < kVecs; ++v)
      sums[v] += quants_at<kBits>(row, v * kLanes) * (x * load(reinterpret_cast<const float*>(block) + v * kLanes));
  }
  finish_row<kVecs>(sums, out, columns, Finish{false, nullptr});
}

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
