// The inner loops of matrix products: a few rows of x times a few columns of a weight panel, sums in registers.
//
// Order of arithmetic, the same in every tile whatever its size: K is cut into slices of slice_depth(K); each slice is one
// chain, sum = 0; for k = 0, 1, ...: sum += x[k] * w[k]; the slices' sums are added in order, then the bias. So a row's bits
// do not depend on the rows that share its tile. (Short chains: the error of one long chain grows with K.)
// Knows layouts and registers; does not know threads or how work is divided.
#pragma once
#include <cstring>

#include "cpu/linear.h"
#include "uma/simd.h"

#define UMA_UNROLL _Pragma("GCC unroll 32")
#define UMA_INLINE inline __attribute__((always_inline))

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int kVecs = kPanel / kLanes;  // vectors in one k of a panel
constexpr int kTileVecs = 2;            // of which a tile of many rows takes this many at a time
// Rows of the largest tile: rows * kTileVecs sums, kTileVecs weights and a value of x fill the registers.
#if defined(UMA_ISA_AVX512)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// Where few rows stream a weight, memory is asked for bytes this far ahead: hardware's prefetch ends with a page.
constexpr int64_t kAhead = 3072;
static UMA_INLINE void prefetch_ahead(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + kAhead + i);
}

// Keeps a product from being fused with the addition after it: a dequantised weight is rounded after each step, as
// BlockQuantized.dequantize rounds it.
static UMA_INLINE vf rounded(vf v) {
#if defined(UMA_ISA_AVX512)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// Four bytes in every lane. Written out: GCC would load many of them into scalar registers first and move them over one by one.
template <typename T>
static UMA_INLINE vi splat_word(const T* p) {
  static_assert(sizeof(T) == 4);
#if defined(UMA_ISA_AVX512)
  vi v;
  __asm__("vpbroadcastd %1, %0" : "=v"(v) : "m"(*p));
  return v;
#elif defined(UMA_ISA_AVX2)
  vi v;
  __asm__("vpbroadcastd %1, %0" : "=x"(v) : "m"(*p));
  return v;
#else
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word - vi{};
#endif
}

template <int kBits_, bool kMins_>
struct Format {
  static constexpr int kBits = kBits_;
  static constexpr bool kMins = kMins_;
  static constexpr int kQuants = kMins ? 256 : 128;    // bytes of a block before its quants
  static constexpr int kRow = kPanel * kBits / 8;      // bytes of a panel's quants (or floats) at one k
};
using Dense = Format<32, false>;

// body(Format) for the format of `w`.
template <typename Body>
static inline void with_format(const PackedWeight& w, const Body& body) {
  if (w.bits == 32) return body(Dense());
  if (w.bits == 4) return w.has_mins ? body(Format<4, true>()) : body(Format<4, false>());
  return w.has_mins ? body(Format<8, true>()) : body(Format<8, false>());
}

// kLanes bytes widened to integers (GCC 12 widens byte vectors one element at a time, hence the
// intrinsics; their maskz form, as the plain one draws a warning about an uninitialised operand inside GCC's header).
static UMA_INLINE vi widen(const uint8_t* p) {
#if defined(UMA_ISA_AVX512)
  return reinterpret_cast<vi>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(UMA_ISA_AVX2)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const vbu*>(p), vi);
#endif
}
static UMA_INLINE vi widen(const int8_t* p) {
#if defined(UMA_ISA_AVX512)
  return reinterpret_cast<vi>(_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(UMA_ISA_AVX2)
  return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const vcu*>(p), vi);
#endif
}

// Quants at one k, columns column .. column + kLanes - 1 of the panel, as floats. `column` is a constant once inlined.
template <int kBits>
static UMA_INLINE vf quants_at(const uint8_t* row, int column) {
  if constexpr (kBits == 8) {
    return to_float(widen(reinterpret_cast<const int8_t*>(row) + column));
  } else {
    vi pair = widen(row + column % 16);
    if (column >= 16) pair >>= 4;
#if defined(UMA_ISA_AVX512)
    // A look-up by the low four bits of each lane masks and converts in one instruction.
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(pair), table);
#else
    return to_float(pair & 15);
#endif
  }
}

// Depth of all slices of K but the last: at most 512, about equal, whole blocks.
static inline int64_t slice_depth(int64_t k) {
  const int64_t slices = (k + 511) / 512;
  return ((k + slices - 1) / slices + 31) / 32 * 32;
}

// Calls use(p, v, weight) for each of `depth` k in order: `weight` is vector v (from `column` on) of panel p at that k,
// dequantised in registers. `next()` follows each k. `at` is where the first panel's first k lies.
template <typename F, int kPanels, int kV, typename Use, typename Next>
static UMA_INLINE void for_weights(const PackedWeight& w, const uint8_t* at, int64_t depth, int column, const Use& use,
                                   const Next& next) {
  const int64_t stride = w.panel_bytes();
  if constexpr (F::kBits == 32) {
    for (int64_t k = 0; k < depth; ++k, at += F::kRow) {
      UMA_UNROLL for (int p = 0; p < kPanels; ++p)
        UMA_UNROLL for (int v = 0; v < kV; ++v)
          use(p, v, load(reinterpret_cast<const float*>(at + p * stride) + column + v * kLanes));
      next();
    }
  } else {
    const int64_t block_bytes = w.block_bytes();
    for (int64_t k = 0; k < depth; k += w.block_size, at += block_bytes) {
      vf scale[kPanels][kV], min[kPanels][kV];
      UMA_UNROLL for (int p = 0; p < kPanels; ++p) {
        // In 4 bits fp32 products are bound by unpacking, not by memory.
        if (F::kBits == 8 && column == 0) prefetch_ahead(at + p * stride, block_bytes);
        UMA_UNROLL for (int v = 0; v < kV; ++v) {
          const float* parameters = reinterpret_cast<const float*>(at + p * stride) + column + v * kLanes;
          scale[p][v] = load(parameters);
          if constexpr (F::kMins) min[p][v] = load(parameters + kPanel);
        }
      }
      const uint8_t* row = at + F::kQuants;
      for (int i = 0; i < w.block_size; ++i, row += F::kRow) {
        UMA_UNROLL for (int p = 0; p < kPanels; ++p)
          UMA_UNROLL for (int v = 0; v < kV; ++v) {
            vf weight = rounded(quants_at<F::kBits>(row + p * stride, column + v * kLanes) * scale[p][v]);
            if constexpr (F::kMins) weight = rounded(weight + min[p][v]);
            use(p, v, weight);
          }
        next();
      }
    }
  }
}

// What becomes of a slice's sums: out = sums, or out += sums if `add`; and the bias on top, unless null.
struct Finish {
  bool add;
  const float* bias;
};

// The last columns of a weight whose width is no multiple of a tile's: out of line, to keep the common path short.
static __attribute__((noinline, unused)) void finish_columns(const float* sums, float* out, int64_t count, const Finish& finish) {
  for (int64_t j = 0; j < count; ++j) {
    float sum = sums[j];
    if (finish.add) sum += out[j];
    if (finish.bias) sum += finish.bias[j];
    out[j] = sum;
  }
}

// Writes at most kV * kLanes columns of one row, `count` if that is fewer.
template <int kV>
static UMA_INLINE void finish_row(const vf (&sums)[kV], float* out, int64_t count, const Finish& finish) {
  if (count >= kV * kLanes) {
    UMA_UNROLL for (int v = 0; v < kV; ++v) {
      vf sum = sums[v];
      if (finish.add) sum += load(out + v * kLanes);
      if (finish.bias) sum += load(finish.bias + v * kLanes);
      store(out + v * kLanes, sum);
    }
  } else {
    float row[kV * kLanes];
    UMA_UNROLL for (int v = 0; v < kV; ++v) store(row + v * kLanes, sums[v]);
    finish_columns(row, out, count, finish);
  }
}

// A whole product of few rows: out rows `out`, `out + ldo`, ... of kRows rows of x ([K][kRows]) with kPanels panels of `w`
// from `first` on, the weight dequantised in registers.
template <typename F, int kRows, int kPanels, int kV>
static inline void few_rows_tile(const PackedWeight& w, int64_t first, const float* x, const float* bias, float* out,
                                 int64_t ldo) {
  const uint8_t* panel = w.data + first * w.panel_bytes();
  const int64_t slice = slice_depth(w.k);
  UMA_UNROLL for (int column = 0; column < kPanel; column += kV * kLanes) {
    for (int64_t k = 0; k < w.k; k += slice) {
      const int64_t depth = slice < w.k - k ? slice : w.k - k;
      vf sums[kRows][kPanels][kV] = {};
      const float* value = x + k * kRows;
      for_weights<F, kPanels, kV>(
          w, panel + w.bytes_of(k), depth, column,
          [&](int p, int v, vf weight) __attribute__((always_inline)) {
            UMA_UNROLL for (int r = 0; r < kRows; ++r) sums[r][p][v] += value[r] * weight;
          },
          [&]() __attribute__((always_inline)) { value += kRows; });
      UMA_UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t n = (first + p) * kPanel + column;
        const Finish finish{k > 0, k + depth == w.k && bias ? bias + n : nullptr};
        UMA_UNROLL for (int r = 0; r < kRows; ++r) finish_row<kV>(sums[r][p], out + r * ldo + n, w.n - n, finish);
      }
    }
  }
}

// One slice of a product of many rows: kRows rows of x ([depth][kRows]) times kV vectors of `depth` rows of dense weights
// that lie `ldw` floats apart.
struct TileStep {
  const float* x;
  const float* weights;
  int64_t ldw, depth;
  float* const* out;  // one pointer for each row, at the tile's first column
  int64_t columns;    // from there to the row's end
  Finish finish;
};

template <int kRows, int kV>
static void dense_tile(const TileStep& step) {
  vf sums[kRows][kV] = {};
  const float* x = step.x;
  const float* weights = step.weights;
  const int64_t ldw = step.ldw;
  for (int64_t k = step.depth; k > 0; --k, x += kRows, weights += ldw) {
    vf weight[kV];
    UMA_UNROLL for (int v = 0; v < kV; ++v) weight[v] = load(weights + v * kLanes);
    UMA_UNROLL for (int r = 0; r < kRows; ++r) {
      const vf value = splat(x[r]);
      UMA_UNROLL for (int v = 0; v < kV; ++v) sums[r][v] += value * weight[v];
    }
  }
  UMA_UNROLL for (int r = 0; r < kRows; ++r) finish_row<kV>(sums[r], step.out[r], step.columns, step.finish);
}

using TileFn = void (*)(const TileStep&);

// dense_tile for 1 .. kTileRows rows.
template <int kV>
struct Tiles {
  static TileFn of(int rows) {
    static constexpr TileFn table[] = {
        nullptr,           dense_tile<1, kV>, dense_tile<2, kV>, dense_tile<3, kV>,  dense_tile<4, kV>,  dense_tile<5, kV>, dense_tile<6, kV>,
#if defined(UMA_ISA_AVX512)
        dense_tile<7, kV>, dense_tile<8, kV>, dense_tile<9, kV>, dense_tile<10, kV>, dense_tile<11, kV>, dense_tile<12, kV>,
#endif
    };
    return table[rows];
  }
};

// `count` rows are cut into tiles of at most kTileRows rows whose sizes differ by at most one.
static inline int64_t tile_count(int64_t count) { return (count + kTileRows - 1) / kTileRows; }
static inline int64_t tile_begin(int64_t count, int64_t tiles, int64_t tile) { return count * tile / tiles; }

// to[k][r] = rows[r][k] for k < depth: rows side by side, as tiles read them.
static __attribute__((noinline, unused)) void interleave_rows(const float* const* rows, int64_t count, int64_t depth, float* to) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef float v4u __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t i4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define UMA_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define UMA_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif
  constexpr int64_t kStep = 64;  // k at a time, so that what is written stays in the L1 cache until its lines are full
  for (int64_t begin = 0; begin < depth; begin += kStep, to += kStep * count) {
    const int64_t steps = depth - begin < kStep ? depth - begin : kStep;
    int r = 0;
    for (; r + 4 <= count; r += 4) {
      const float *r0 = rows[r] + begin, *r1 = rows[r + 1] + begin, *r2 = rows[r + 2] + begin, *r3 = rows[r + 3] + begin;
      float* at = to + r;
      int64_t k = 0;
      for (; k + 4 <= steps; k += 4, at += 4 * count) {
        const v4 a = *reinterpret_cast<const v4u*>(r0 + k), b = *reinterpret_cast<const v4u*>(r1 + k);
        const v4 c = *reinterpret_cast<const v4u*>(r2 + k), d = *reinterpret_cast<const v4u*>(r3 + k);
        const v4 ab_low = UMA_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = UMA_SHUFFLE(a, b, 2, 6, 3, 7);
        const v4 cd_low = UMA_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = UMA_SHUFFLE(c, d, 2, 6, 3, 7);
        *reinterpret_cast<v4u*>(at) = UMA_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
        *reinterpret_cast<v4u*>(at + count) = UMA_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
        *reinterpret_cast<v4u*>(at + 2 * count) = UMA_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
        *reinterpret_cast<v4u*>(at + 3 * count) = UMA_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
      }
      for (; k < steps; ++k, at += count) at[0] = r0[k], at[1] = r1[k], at[2] = r2[k], at[3] = r3[k];
    }
    for (; r < count; ++r)
      for (int64_t k = 0; k < steps; ++k) to[k * count + r] = rows[r][begin + k];
  }
#undef UMA_SHUFFLE
}

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
