#include "cpu/lora.h"

#include <cstring>

#include "cpu/linear_tile.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

constexpr int64_t kNarrow = 16;  // width of A's last panel where the rest of the rank fits into it

struct Adapter : LoraHeader {
  const uint8_t *a, *b;
};

// body(T()) for the type of an adapter's factors.
template <typename Body>
auto with_type(FactorType type, const Body& body) {
  if (type == FactorType::fp16) return body(fp16());
  if (type == FactorType::bf16) return body(bf16());
  return body(float());
}
int64_t size_of(FactorType type) {
  return with_type(type, [](auto factor) { return static_cast<int64_t>(sizeof(factor)); });
}

// Factors of A's rows once padded.
int64_t padded_rank(int64_t rank) { return (rank + kNarrow - 1) / kNarrow * kNarrow; }
int64_t rank_panels(int64_t rank) { return (rank + kPanel - 1) / kPanel; }
int64_t panel_width(int64_t rank, int64_t panel) {
  const int64_t rest = padded_rank(rank) - panel * kPanel;
  return rest < kPanel ? rest : kPanel;
}
int64_t out_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

Adapter unpack(const uint8_t* packed) {
  LoraHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const uint8_t* a = packed + sizeof(header);
  return {header, a, a + padded_rank(header.rank) * header.k * size_of(header.type)};
}

int64_t packed_bytes(int64_t rank, int64_t k, int64_t n, FactorType type) {
  return sizeof(LoraHeader) + size_of(type) * (padded_rank(rank) * k + out_panels(n) * kPanel * rank);
}

// As interleave_rows: blocks of 8 x 8 transposed in registers, by pairs of 16, 32 and 64 bits. `count` is a multiple of 8.
template <typename T>
void interleave_halves(const T* const* rows, int64_t count, int64_t depth, T* to) {
  typedef uint16_t h8 __attribute__((vector_size(16)));
  typedef uint16_t h8u __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t w4 __attribute__((vector_size(16)));
  typedef uint64_t d2 __attribute__((vector_size(16)));
  static_assert(kNarrow % 8 == 0 && kPanel % 8 == 0 && sizeof(T) == 2);
#if defined(__clang__)
#define UMA_PAIRS(V, I, a, b, ...) __builtin_shufflevector(reinterpret_cast<V>(a), reinterpret_cast<V>(b), __VA_ARGS__)
#else
#define UMA_PAIRS(V, I, a, b, ...) __builtin_shuffle(reinterpret_cast<V>(a), reinterpret_cast<V>(b), (I){__VA_ARGS__})
#endif
  constexpr int64_t kStep = 64;  // k at a time, so that what is written stays in the L1 cache until its lines are full
  for (int64_t begin = 0; begin < depth; begin += kStep, to += kStep * count) {
    const int64_t steps = depth - begin < kStep ? depth - begin : kStep;
    for (int64_t r = 0; r < count; r += 8) {
      int64_t k = 0;
      for (; k + 8 <= steps; k += 8) {
        h8 in[8];
        UMA_UNROLL for (int i = 0; i < 8; ++i) in[i] = *reinterpret_cast<const h8u*>(rows[r + i] + begin + k);
        w4 two[8];  // k 0-3 of rows 2i and 2i + 1, then their k 4-7
        UMA_UNROLL for (int i = 0; i < 4; ++i) {
          two[2 * i] = reinterpret_cast<w4>(UMA_PAIRS(h8, h8, in[2 * i], in[2 * i + 1], 0, 8, 1, 9, 2, 10, 3, 11));
          two[2 * i + 1] = reinterpret_cast<w4>(UMA_PAIRS(h8, h8, in[2 * i], in[2 * i + 1], 4, 12, 5, 13, 6, 14, 7, 15));
        }
        UMA_UNROLL for (int half = 0; half < 2; ++half) {  // k 0-3, then 4-7
          const w4 a = two[half], b = two[2 + half], c = two[4 + half], d = two[6 + half];
          UMA_UNROLL for (int pair = 0; pair < 2; ++pair) {
            const w4 top = pair ? UMA_PAIRS(w4, w4, a, b, 2, 6, 3, 7) : UMA_PAIRS(w4, w4, a, b, 0, 4, 1, 5);
            const w4 low = pair ? UMA_PAIRS(w4, w4, c, d, 2, 6, 3, 7) : UMA_PAIRS(w4, w4, c, d, 0, 4, 1, 5);
            T* at = to + (k + 4 * half + 2 * pair) * count + r;
            *reinterpret_cast<h8u*>(at) = reinterpret_cast<h8>(UMA_PAIRS(d2, d2, top, low, 0, 2));
            *reinterpret_cast<h8u*>(at + count) = reinterpret_cast<h8>(UMA_PAIRS(d2, d2, top, low, 1, 3));
          }
        }
      }
      for (; k < steps; ++k)
        for (int i = 0; i < 8; ++i) to[k * count + r + i] = rows[r + i][begin + k];
    }
  }
#undef UMA_PAIRS
}

// Rows [first, first + width) of a matrix [count][depth] as one panel.
template <typename T>
void pack_panel(const T* matrix, int64_t count, int64_t depth, int64_t first, int64_t width, const T* zeros, T* to) {
  const T* rows[kPanel];
  for (int64_t j = 0; j < width; ++j) rows[j] = first + j < count ? matrix + (first + j) * depth : zeros;
  if constexpr (sizeof(T) == 2)
    interleave_halves(rows, width, depth, to);
  else
    interleave_rows(rows, width, depth, to);
}

template <typename T>
void pack_factors(T* at, const LoraHeader& header, const T* a, const T* b) {
  static thread_local Scratch scratch;
  const int64_t longest = header.k > header.rank ? header.k : header.rank;
  const T* zeros = static_cast<const T*>(std::memset(scratch.bytes(longest * sizeof(T)), 0, longest * sizeof(T)));
  for (int64_t panel = 0; panel < rank_panels(header.rank); ++panel) {
    const int64_t width = panel_width(header.rank, panel);
    pack_panel(a, header.rank, header.k, panel * kPanel, width, zeros, at);
    at += width * header.k;
  }
  for (int64_t panel = 0; panel < out_panels(header.n); ++panel, at += kPanel * header.rank)
    pack_panel(b, header.n, header.rank, panel * kPanel, kPanel, zeros, at);
}

// Whether no value is a NaN or an infinity: those have every bit of the exponent.
template <typename Bits>
bool all_finite(const void* values, int64_t count, Bits exponent) {
  typedef Bits Unaligned __attribute__((aligned(1), may_alias));
  const Unaligned* bits = static_cast<const Unaligned*>(values);
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= (bits[i] & exponent) == exponent;
  return found == 0;
}
bool all_finite(FactorType type, const void* values, int64_t count) {
  if (type == FactorType::fp16) return all_finite<uint16_t>(values, count, 0x7c00);
  if (type == FactorType::bf16) return all_finite<uint16_t>(values, count, 0x7f80);
  return all_finite<uint32_t>(values, count, 0x7f800000);
}

bool pack(uint8_t* to, const LoraHeader& header, const void* a, const void* b) {
  if (!all_finite(header.type, a, header.rank * header.k) || !all_finite(header.type, b, header.n * header.rank)) return false;
  std::memcpy(to, &header, sizeof(header));
  with_type(header.type, [&](auto factor) {
    using T = decltype(factor);
    pack_factors(reinterpret_cast<T*>(to + sizeof(header)), header, static_cast<const T*>(a), static_cast<const T*>(b));
  });
  return true;
}

// Some rows of one adapter, in the order of rows: what passes through a site's factors together, while those are in the cache.
struct RowBlock {
  int64_t adapter, first, rows;
};
constexpr int64_t kBlockTiles = 4;      // of a block, at most
constexpr int64_t kExpandBytes = 16384;  // of B that all tiles of a block pass before the next: half of an L1 cache

// out = or += some rows of x times `panels` panels of `width` columns, `depth` of their `stride` k. Rows of x are read where
// they lie: with few columns, bringing them side by side would cost as much as the product.
template <typename T>
struct RowsStep {
  const float* const* x;
  const T* weights;
  int64_t width, depth, stride, panels;
  float* const* out;
  int64_t columns;  // from `out` to the row's end
  bool add;
};

// Out of line: inlined among others, its pointers would not stay in registers.
template <int kRows, int kV, typename T>
__attribute__((noinline)) void rows_tile(const RowsStep<T>& step) {
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = step.x[r];
  const int64_t depth = step.depth, width = step.width;
  int64_t at = 0;  // columns done
  for (int64_t p = 0; p < step.panels; ++p) {
    for (int64_t column = 0; column < width && at < step.columns; column += kV * kLanes, at += kV * kLanes) {
      vf sums[kRows][kV] = {};
      const T* weights = step.weights + p * width * step.stride + column;
      for (int64_t k = 0; k < depth; ++k, weights += width) {
        vf weight[kV];
        UMA_UNROLL for (int v = 0; v < kV; ++v) weight[v] = load(weights + v * kLanes);
        UMA_UNROLL for (int r = 0; r < kRows; ++r) {
          const vf value = splat(x[r][k]);
          UMA_UNROLL for (int v = 0; v < kV; ++v) sums[r][v] += value * weight[v];
        }
      }
      const Finish finish{step.add, nullptr};
      UMA_UNROLL for (int r = 0; r < kRows; ++r) finish_row<kV>(sums[r], step.out[r] + at, step.columns - at, finish);
    }
  }
}

template <int kRows, typename T>
void rows_step(int rows, const RowsStep<T>& step) {
  if (rows == kRows) return step.width >= kTileVecs * kLanes ? rows_tile<kRows, kTileVecs>(step) : rows_tile<kRows, 1>(step);
  if constexpr (kRows > 1) rows_step<kRows - 1>(rows, step);
}

// body(first row, rows) for each tile of a block.
template <typename Body>
void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = tile_count(rows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = tile_begin(rows, tiles, t);
    body(first, static_cast<int>(tile_begin(rows, tiles, t + 1) - first));
  }
}

// shrunk[i] = scaling * x A^T of row order[i], i < rows; rows of `shrunk` are padded_rank floats.
template <typename T>
void shrink(const Adapter& adapter, const T* a, const float* x, const int32_t* order, int64_t rows, float* shrunk) {
  const int64_t slice = slice_depth(adapter.k), ld = padded_rank(adapter.rank);
  for (int64_t panel = 0; panel < rank_panels(adapter.rank); ++panel) {
    const int64_t column = panel * kPanel, width = panel_width(adapter.rank, panel);
    for (int64_t k = 0; k < adapter.k; k += slice) {
      const T* weights = a + column * adapter.k + k * width;
      const int64_t depth = slice < adapter.k - k ? slice : adapter.k - k;
      for_tiles(rows, [&](int64_t first, int count) {
        const float* from[kTileRows];
        float* to[kTileRows];
        for (int r = 0; r < count; ++r) {
          from[r] = x + order[first + r] * adapter.k + k;
          to[r] = shrunk + (first + r) * ld + column;
        }
        rows_step<kTileRows, T>(count, {from, weights, width, depth, depth, 1, to, width, k > 0});
      });
    }
  }
  for (int64_t i = 0; i < rows * ld; i += kLanes) store(shrunk + i, load(shrunk + i) * adapter.scaling);
}
void shrink(const Adapter& adapter, const float* x, const int32_t* order, int64_t rows, float* shrunk) {
  with_type(adapter.type, [&](auto factor) {
    shrink(adapter, reinterpret_cast<const decltype(factor)*>(adapter.a), x, order, rows, shrunk);
  });
}

// The columns of panels [panel, end) of row order[i] of out += shrunk[i] B^T.
template <typename T>
void expand(const Adapter& adapter, const T* b, const float* shrunk, const int32_t* order, int64_t rows, int64_t panel, int64_t end,
            float* out, int64_t out_stride) {
  const int64_t slice = slice_depth(adapter.rank), ld = padded_rank(adapter.rank);
  const int64_t most = kExpandBytes / static_cast<int64_t>(kPanel * adapter.rank * sizeof(T)) + 1;
  for (; panel < end; panel += most) {
    const int64_t n = panel * kPanel, panels = most < end - panel ? most : end - panel;
    for_tiles(rows, [&](int64_t first, int count) {
      for (int64_t k = 0; k < adapter.rank; k += slice) {
        const float* from[kTileRows];
        float* to[kTileRows];
        for (int r = 0; r < count; ++r) {
          from[r] = shrunk + (first + r) * ld + k;
          to[r] = out + order[first + r] * out_stride + n;
        }
        const int64_t depth = slice < adapter.rank - k ? slice : adapter.rank - k;
        const T* weights = b + n * adapter.rank + k * kPanel;
        rows_step<kTileRows, T>(count, {from, weights, kPanel, depth, adapter.rank, panels, to, adapter.n - n, true});
      }
    });
  }
}

void expand(const Adapter& adapter, const float* shrunk, const int32_t* order, int64_t rows, int64_t panel, int64_t end,
            float* out, int64_t out_stride) {
  with_type(adapter.type, [&](auto factor) {
    expand(adapter, reinterpret_cast<const decltype(factor)*>(adapter.b), shrunk, order, rows, panel, end, out, out_stride);
  });
}

void lora(const float* x, float* out, int64_t out_stride, const LoraSlice* slices, int64_t num_slices, const int32_t* offsets,
          int64_t count, const int32_t* order) {
  static thread_local Scratch block_memory, shared_memory;
  const int64_t rows = offsets[count] - offsets[0], threads = get_num_threads();
  int64_t largest = 0;  // padded rank
  for (int64_t s = 0; s < num_slices; ++s)
    for (int64_t i = 0; i < count; ++i)
      if (slices[s].adapters[i] != nullptr) {
        const int64_t own = padded_rank(unpack(slices[s].adapters[i]).rank);
        largest = own > largest ? own : largest;
      }
  if (rows == 0 || largest == 0) return;

  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) tiles += tile_count(offsets[i + 1] - offsets[i]);
  RowBlock* block = static_cast<RowBlock*>(block_memory.bytes(tiles * sizeof(RowBlock)));
  int64_t block_tiles = tiles / (4 * threads);  // few enough that the threads end together
  block_tiles = block_tiles < 1 ? 1 : block_tiles < kBlockTiles ? block_tiles : kBlockTiles;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = offsets[i + 1] - offsets[i], parts = (tile_count(own) + block_tiles - 1) / block_tiles;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = own * p / parts;
      block[blocks++] = {i, offsets[i] + first, own * (p + 1) / parts - first};
    }
  }

  if (blocks >= 2 * threads) {
    parallel_for(blocks, [&](int64_t task) {
      static thread_local Scratch own_memory;
      const RowBlock& own = block[task];
      float* shrunk = own_memory.floats(own.rows * largest);
      for (int64_t s = 0; s < num_slices; ++s) {
        if (slices[s].adapters[own.adapter] == nullptr) continue;
        const Adapter adapter = unpack(slices[s].adapters[own.adapter]);
        shrink(adapter, x, order + own.first, own.rows, shrunk);
        expand(adapter, shrunk, order + own.first, own.rows, 0, out_panels(adapter.n), out + slices[s].column, out_stride);
      }
    });
    return;
  }
  // Few blocks (decoding): slices and columns are divided too, or one thread would read an adapter alone.
  float* shared = shared_memory.floats(num_slices * rows * largest);
  const auto shrunk_of = [&](const RowBlock& own, int64_t s) {
    return shared + (s * rows + own.first - offsets[0]) * largest;
  };
  parallel_for(blocks * num_slices, [&](int64_t task) {
    const int64_t s = task % num_slices;
    const RowBlock& own = block[task / num_slices];
    if (slices[s].adapters[own.adapter] == nullptr) return;
    shrink(unpack(slices[s].adapters[own.adapter]), x, order + own.first, own.rows, shrunk_of(own, s));
  });
  const int64_t cuts = 2 * threads;
  parallel_for(blocks * num_slices * cuts, [&](int64_t task) {
    const int64_t s = task / cuts % num_slices, cut = task % cuts;
    const RowBlock& own = block[task / cuts / num_slices];
    if (slices[s].adapters[own.adapter] == nullptr) return;
    const Adapter adapter = unpack(slices[s].adapters[own.adapter]);
    const int64_t panels = out_panels(adapter.n);
    expand(adapter, shrunk_of(own, s), order + own.first, own.rows, panels * cut / cuts, panels * (cut + 1) / cuts,
           out + slices[s].column, out_stride);
  });
}

}  // namespace

const LoraOps& lora_ops() {
  static const LoraOps ops = {packed_bytes, pack, lora};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
