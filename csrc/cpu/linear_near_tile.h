// The inner loops of `near` products (linear_near.h): blocks of x in 16 bits times a panel's quants, sums in registers.
//
// Two neighbours in k travel as one 32-bit lane, a pair, low half first: one instruction multiplies both and adds the
// products. Rows of x lie as [blocks][rows][16 pairs] with their parameters as [blocks][2][rows] (scale_x, scale_x * sum).
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

constexpr int kPairs = 16;  // room for the pairs of one row's block; a block of 16 fills half of it
// Rows of the largest tile. Its integer sums stay in registers; those in fp32 are touched once a block, and some wait in memory.
#if defined(UMA_ISA_AVX512)
constexpr int kNearRows = 8;
#else
constexpr int kNearRows = 6;
#endif

typedef int16_t vs __attribute__((vector_size(kLanes * 2)));
typedef int16_t vsu __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

static UMA_INLINE vi load_pairs(const int32_t* p) { return *reinterpret_cast<const viu*>(p); }
static UMA_INLINE void store_pairs(int32_t* p, vi v) { *reinterpret_cast<viu*>(p) = v; }

// sum + low half * low half + high half * high half, in each lane. The VNNI forms are written out, since intrinsics would need
// every function around them compiled for that extension. In the others asm keeps each product beside its addition: GCC
// would gather the products of many steps first, and run out of registers.
template <bool kVnni>
static UMA_INLINE vi dot_pairs(vi sum, vi weights, vi x) {
#if defined(UMA_ISA_AVX512)
  if constexpr (kVnni) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  } else {
    sum += reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(x)));
    __asm__("" : "+v"(sum));
  }
#elif defined(UMA_ISA_AVX2)
  if constexpr (kVnni) {
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(x));
  } else {
    vi products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(weights), "x"(x));
  }
#elif defined(__SSE2__)
  sum += reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(weights), reinterpret_cast<__m128i>(x)));
  __asm__("" : "+x"(sum));
#else
  sum += (weights << 16 >> 16) * (x << 16 >> 16) + (weights >> 16) * (x >> 16);
#endif
  return sum;
}

// The pairs of columns column .. column + kLanes - 1 of a panel; `row` is where its quants of the first k of the pair lie.
template <int kBits>
static UMA_INLINE vi quant_pairs(const uint8_t* row, int column) {
#if defined(UMA_ISA_AVX512)
  if constexpr (kBits == 4) {
    // Both rows are 16 bytes: widen them at once, then interleave.
    alignas(64) static constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_maskz_cvtepu8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    const __m512i bytes = _mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(kInterleave), both);
    return reinterpret_cast<vi>(column < 16 ? _mm512_and_si512(bytes, _mm512_set1_epi16(15))
                                            : _mm512_maskz_srli_epi16(~0u, bytes, 4));
  }
#elif defined(UMA_ISA_AVX2)
  constexpr int kRow = kPanel * kBits / 8;
  const uint8_t* at = row + (kBits == 4 ? column % 16 : column);
  const __m128i bytes = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)),
                                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + kRow)));
  if constexpr (kBits == 8) return reinterpret_cast<vi>(_mm256_cvtepi8_epi16(bytes));
  const __m256i words = _mm256_cvtepu8_epi16(bytes);
  return reinterpret_cast<vi>(column < 16 ? _mm256_and_si256(words, _mm256_set1_epi16(15)) : _mm256_srli_epi16(words, 4));
#endif
  if constexpr (kBits == 8) {
    const int8_t* at = reinterpret_cast<const int8_t*>(row) + column;
    return (widen(at) & 0xffff) | widen(at + kPanel) << 16;
  } else {
    const vi bytes = widen(row + column % 16) | widen(row + 16 + column % 16) << 16;
    return (column < 16 ? bytes : bytes >> 4) & 0x000f000f;
  }
}

// One tile's work: kRows rows of x times kV vectors of a panel, over `blocks` blocks.
struct NearStep {
  const int32_t* x;         // the first block's pairs
  const float* x_scales;    // and parameters
  const uint8_t* panel;     // the first block of the panel, at the parameters of its column 0
  int64_t block_bytes;
  const int32_t* unpacked;  // the panel's pairs, [pairs of all blocks][32]; null: they are taken from `panel`
  int64_t blocks;
  bool mins;
  bool add;                 // `out` holds the sum of the blocks before these
  int column;               // of the panel, where the tile begins
  const float* bias;        // from that column on; null: none, or these are not the last blocks
  float* out;               // row 0, from that column on; row r lies r * ldo further
  int64_t ldo, columns;     // columns: from there to the row's end
};

static __attribute__((noinline, unused)) void copy_columns(const float* from, float* to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] = from[j];
}

// kBits 0: the weight's pairs are unpacked already. kSize: the block's.
template <bool kVnni, int kBits, int kSize, int kRows, int kV>
static void near_tile(const NearStep& step) {
  vf sums[kRows][kV] = {};
  if (step.add) {
    UMA_UNROLL for (int r = 0; r < kRows; ++r) {
      const float* from = step.out + r * step.ldo;
      float row[kV * kLanes] = {};
      if (step.columns < kV * kLanes) copy_columns(from, row, step.columns), from = row;
      UMA_UNROLL for (int v = 0; v < kV; ++v) sums[r][v] = load(from + v * kLanes);
    }
  }
  const int32_t* x = step.x;
  const float* x_scales = step.x_scales;
  const int32_t* unpacked = step.unpacked + step.column;
  const uint8_t* panel = step.panel;
  const int head = step.mins ? 256 : 128;
  for (int64_t block = 0; block < step.blocks; ++block) {
    if (kBits != 0 && step.column == 0) prefetch_ahead(panel, step.block_bytes);
    vi dots[kRows][kV] = {};
    UMA_UNROLL for (int pair = 0; pair < kSize / 2; ++pair) {
      vi weight[kV];
      UMA_UNROLL for (int v = 0; v < kV; ++v) {
        if constexpr (kBits == 0) {
          weight[v] = load_pairs(unpacked + pair * kPanel + v * kLanes);
        } else {
          weight[v] = quant_pairs<kBits>(panel + head + pair * (2 * kPanel * kBits / 8), step.column + v * kLanes);
        }
      }
      UMA_UNROLL for (int r = 0; r < kRows; ++r) {
        const vi pairs = splat_word(x + r * kPairs + pair);
        UMA_UNROLL for (int v = 0; v < kV; ++v) dots[r][v] = dot_pairs<kVnni>(dots[r][v], weight[v], pairs);
      }
    }
    const float* parameters = reinterpret_cast<const float*>(panel) + step.column;
    // Two copies, as a sum should be fetched and put back once. The empty asm keeps what they share from being computed
    // before the branch, where it would push sums out of the registers.
    const auto fold = [&](auto mins) __attribute__((always_inline)) {
      __asm__ volatile("" ::: "memory");
      UMA_UNROLL for (int v = 0; v < kV; ++v) {
        const vf scale = load(parameters + v * kLanes);
        UMA_UNROLL for (int r = 0; r < kRows; ++r) {
          vf sum = sums[r][v] + to_float(dots[r][v]) * (splat(x_scales[r]) * scale);
          if constexpr (decltype(mins)::value) sum += splat(x_scales[kRows + r]) * load(parameters + kPanel + v * kLanes);
          sums[r][v] = sum;
        }
      }
    };
    step.mins ? fold(std::true_type()) : fold(std::false_type());
    x += kRows * kPairs;
    x_scales += 2 * kRows;
    unpacked += kSize / 2 * kPanel;
    panel += step.block_bytes;
  }
  UMA_UNROLL for (int r = 0; r < kRows; ++r)
    finish_row<kV>(sums[r], step.out + r * step.ldo, step.columns, Finish{false, step.bias});
}

// to[pair][32] = the pairs of `blocks` blocks of a panel.
template <int kBits>
static void unpack_pairs(const uint8_t* panel, int64_t block_bytes, int64_t blocks, int pairs, bool mins, int32_t* to) {
  for (int64_t block = 0; block < blocks; ++block, panel += block_bytes) {
    const uint8_t* quants = panel + (mins ? 256 : 128);
    for (int pair = 0; pair < pairs; ++pair, quants += 2 * kPanel * kBits / 8, to += kPanel)
      UMA_UNROLL for (int v = 0; v < kVecs; ++v) store_pairs(to + v * kLanes, quant_pairs<kBits>(quants, v * kLanes));
  }
}

// Every lane gets the result of all.
template <typename Op>
static UMA_INLINE vi fold_lanes(vi v, const Op& op) {
  UMA_UNROLL for (int width = kLanes / 2; width > 0; width /= 2) {
    vi other;
    UMA_UNROLL for (int i = 0; i < kLanes; ++i) other[i] = v[i ^ width];
    v = op(v, other);
  }
  return v;
}

// One block of one row: its pairs, and its two parameters at `scale` and scale[rows].
template <int kSize>
static UMA_INLINE void quantize_block(const float* x, int16_t* to, float* scale, int64_t rows) {
  constexpr int kSteps = kSize / kLanes;
  constexpr int32_t kInfinity = 0x7f800000, kSmallest = 0x12800000;  // the bits of infinity and of 2^-90
  vi top = {};
  vf values[kSteps];
  UMA_UNROLL for (int i = 0; i < kSteps; ++i) {
    values[i] = load(x + i * kLanes);
    const vi magnitude = reinterpret_cast<vi>(values[i]) & 0x7fffffff;  // ordered as the values are, NaN on top
    top = magnitude > top ? magnitude : top;
  }
  const int32_t bits = fold_lanes(top, [](vi a, vi b) __attribute__((always_inline)) { return a > b ? a : b; })[0];
  if (bits < kSmallest || bits >= kInfinity) {
    std::memset(to, 0, kSize * sizeof(int16_t));
    scale[0] = scale[rows] = bits < kSmallest ? 0.0f : __builtin_nanf("");
    return;
  }
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
  constexpr float kMagic = 12582912.0f;
  constexpr int32_t kMagicBits = 0x4b400000;
  const vf factor = splat(32767.0f / largest);
  vi total = {};
  UMA_UNROLL for (int i = 0; i < kSteps; ++i) {
    const vi rounded_bits = reinterpret_cast<vi>(rounded(values[i] * factor) + kMagic) - kMagicBits;
    total += rounded_bits;
    *reinterpret_cast<vsu*>(to + i * kLanes) = __builtin_convertvector(rounded_bits, vs);
  }
  const int32_t sum = fold_lanes(total, [](vi a, vi b) __attribute__((always_inline)) { return a + b; })[0];
  scale[0] = largest / 32767.0f;
  scale[rows] = scale[0] * static_cast<float>(sum);
}

// `rows` rows of x, k floats each, as a tile reads them.
template <int kSize>
static void quantize_rows(const float* x, int64_t rows, int64_t k, int32_t* pairs, float* scales) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t block = 0; block < k / kSize; ++block)
      quantize_block<kSize>(x + r * k + block * kSize, reinterpret_cast<int16_t*>(pairs + (block * rows + r) * kPairs),
                            scales + 2 * block * rows + r, rows);
}

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
