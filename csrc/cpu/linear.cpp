#include "cpu/linear.h"

#include "cpu/linear_tile.h"
#include "cpu/linear_work.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {

namespace {

// Panels that few_rows_tile sums side by side, and vectors of each: enough chains to hide the latency of an FMA.
template <int kRows>
struct FewRows {
#if defined(UMA_ISA_AVX512)
  static constexpr int kPanels = kRows <= 6 ? 2 : 1;
  static constexpr int kV = 2;
#else
  static constexpr int kPanels = 1;
  static constexpr int kV = kRows == 1 || (kRows == 2 && kVecs == 4) ? kVecs : kTileVecs;
#endif
};

template <typename F, int kRows>
void few_rows(const PackedWeight& w, const float* x, const float* bias, float* out, int64_t ldo) {
  const int64_t panels = w.panels();
  const int64_t groups = w.n * w.k * kRows < kSerialWork ? 1 : group_count(panels, 6);
  parallel_for(groups, [&](int64_t group) {
    int64_t panel = panels * group / groups;
    const int64_t end = panels * (group + 1) / groups;
    for (; panel + FewRows<kRows>::kPanels <= end; panel += FewRows<kRows>::kPanels)
      few_rows_tile<F, kRows, FewRows<kRows>::kPanels, FewRows<kRows>::kV>(w, panel, x, bias, out, ldo);
    for (; panel < end; ++panel) few_rows_tile<F, kRows, 1, FewRows<kRows>::kV>(w, panel, x, bias, out, ldo);
  });
}

// few_rows for rows = kRows, kRows - 1, ... 1.
template <typename F, int kRows>
void few_rows_of(int64_t rows, const PackedWeight& w, const float* x, const float* bias, float* out, int64_t ldo) {
  if (rows == kRows) return few_rows<F, kRows>(w, x, bias, out, ldo);
  if constexpr (kRows > 1) few_rows_of<F, kRows - 1>(rows, w, x, bias, out, ldo);
}

// to[i][32] = one panel's weights at k = i, dequantised; `slice` is where the first of them lies.
template <typename F>
void dequantize_slice(const PackedWeight& w, const uint8_t* slice, int64_t depth, float* to) {
  UMA_UNROLL for (int column = 0; column < kPanel; column += kTileVecs * kLanes) {
    float* at = to + column;
    for_weights<F, 1, kTileVecs>(
        w, slice, depth, column,
        [&](int, int v, vf weight) __attribute__((always_inline)) { store(at + v * kLanes, weight); },
        [&]() __attribute__((always_inline)) { at += kPanel; });
  }
}

// Tiles [tile, tile_end) of x (interleaved) times panels [panel, panel_end). A slice of a panel stays in the cache while the
// tiles pass.
template <typename F>
void many_rows(const PackedWeight& w, int64_t panel, int64_t panel_end, const float* tiled, int64_t rows, int64_t tiles,
               int64_t tile, int64_t tile_end, const float* bias, float* out, int64_t ldo) {
  static thread_local Scratch scratch;
  const int64_t full = slice_depth(w.k), panel_bytes = w.panel_bytes();
  float* dense = F::kBits == 32 ? nullptr : scratch.floats(full * kPanel);
  for (int64_t k = 0; k < w.k; k += full) {
    const int64_t depth = at_most(full, w.k - k);
    for (int64_t p = panel; p < panel_end; ++p) {
      const uint8_t* slice = w.data + p * panel_bytes + w.bytes_of(k);
      if constexpr (F::kBits != 32) dequantize_slice<F>(w, slice, depth, dense);
      const float* weights = F::kBits == 32 ? reinterpret_cast<const float*>(slice) : dense;
      // While the tiles pass, the slice that comes next is fetched from memory, a few lines a tile.
      const uint8_t* next = p + 1 < panel_end ? slice + panel_bytes : w.data + panel * panel_bytes + w.bytes_of(k + depth);
      const int64_t step = (w.bytes_of(depth) / 64 + tile_end - tile - 1) / (tile_end - tile) * 64;
      for (int64_t t = tile; t < tile_end; ++t, next += step) {
        for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(next + i, 0, 2);
        const int64_t first = tile_begin(rows, tiles, t);
        const int count = static_cast<int>(tile_begin(rows, tiles, t + 1) - first);
        for (int column = 0; column < kPanel; column += kTileVecs * kLanes) {
          const int64_t n = p * kPanel + column;
          if (n >= w.n) break;
          float* to[kTileRows];
          for (int r = 0; r < count; ++r) to[r] = out + (first + r) * ldo + n;
          Tiles<kTileVecs>::of(count)({tiled + first * w.k + k * count, weights + column, kPanel, depth, to, w.n - n,
                                       {k > 0, k + depth == w.k && bias ? bias + n : nullptr}});
        }
      }
    }
  }
}

void linear(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t out_stride) {
  if (rows == 0 || w.n == 0) return;
  static thread_local Scratch scratch;
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  for (int64_t block = 0; block < row_blocks; ++block) {
    const int64_t begin = rows * block / row_blocks, count = rows * (block + 1) / row_blocks - begin;
    const int64_t tiles = tile_count(count);
    const float* source = x + begin * w.k;
    float* to = out + begin * out_stride;
    float* tiled = count == 1 ? nullptr : scratch.floats(count * w.k);
    const auto interleave = [&](int64_t tile) {
      const int64_t first = tile_begin(count, tiles, tile), end = tile_begin(count, tiles, tile + 1);
      const float* from[kTileRows];
      for (int64_t r = first; r < end; ++r) from[r - first] = source + r * w.k;
      interleave_rows(from, static_cast<int>(end - first), w.k, tiled + first * w.k);
    };
    if (tiles == 1) {
      if (count > 1) interleave(0);
      with_format(w, [&](auto format) {
        few_rows_of<decltype(format), kTileRows>(count, w, count == 1 ? source : tiled, bias, to, out_stride);
      });
      continue;
    }
    parallel_for(tiles, interleave);
    const int64_t panels = w.panels();
    const int64_t groups = group_count(panels, 1);
    const int64_t cuts = row_cuts(tiles, groups);
    parallel_for(groups * cuts, [&](int64_t task) {
      const int64_t cut = task / groups, group = task % groups;  // neighbours share rows of x
      with_format(w, [&](auto format) {
        many_rows<decltype(format)>(w, panels * group / groups, panels * (group + 1) / groups, tiled, count, tiles,
                                    tiles * cut / cuts, tiles * (cut + 1) / cuts, bias, to, out_stride);
      });
    });
  }
}

}  // namespace

const LinearOps& linear_ops() {
  static const LinearOps ops = {linear};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
