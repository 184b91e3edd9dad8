#include "cpu/linear_near.h"

#include "cpu/linear_near_tile.h"
#include "cpu/linear_work.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {

namespace {

// Rows of x as tiles read them: tile t begins at row tile_begin(rows, tiles, t).
struct QuantizedRows {
  int32_t* pairs;
  float* scales;
  int64_t rows, tiles, blocks;  // blocks: of one row

  int64_t first(int64_t tile) const { return rows * tile / tiles; }
  const int32_t* pairs_of(int64_t tile, int64_t block) const {
    return pairs + (first(tile) * blocks + block * (first(tile + 1) - first(tile))) * kPairs;
  }
  const float* scales_of(int64_t tile, int64_t block) const {
    return scales + (first(tile) * blocks + block * (first(tile + 1) - first(tile))) * 2;
  }
};

using NearTileFn = void (*)(const NearStep&);

// Vectors that a tile of kRows rows takes at a time: enough sums to hide the latency of a multiplication.
template <int kRows>
constexpr int near_vecs() {
  return kRows == 1 && kVecs > 4 ? 4 : kRows == 1 ? kVecs : kTileVecs;
}

// near_tile for rows = kRows, kRows - 1, ... 1.
template <bool kVnni, int kBits, int kSize, int kRows>
NearTileFn near_tile_of(int64_t rows, int* columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return near_tile_of<kVnni, kBits, kSize, kRows - 1>(rows, columns);
  }
  *columns = near_vecs<kRows>() * kLanes;
  return near_tile<kVnni, kBits, kSize, kRows, near_vecs<kRows>()>;
}

// A whole product of few rows, one tile: each weight is read once and unpacked in registers.
template <bool kVnni, int kBits, int kSize>
void few_rows(const QuantizedRows& x, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  int step_columns = 0;
  const NearTileFn run = near_tile_of<kVnni, kBits, kSize, kNearRows>(x.rows, &step_columns);
  const int64_t panels = w.panels();
  const int64_t groups = w.n * w.k * x.rows < kSerialWork ? 1 : group_count(panels, 6);
  parallel_for(groups, [&](int64_t group) {
    for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; ++p) {
      for (int column = 0; column < kPanel; column += step_columns) {
        const int64_t n = p * kPanel + column;
        if (n >= w.n) break;
        run({x.pairs, x.scales, w.data + p * w.panel_bytes(), w.block_bytes(), nullptr, x.blocks, w.has_mins, false, column, bias ? bias + n : nullptr, out + n, ldo, w.n - n});
      }
    }
  });
}

// Tiles [tile, tile_end) of x times panels [panel, panel_end). A slice of a panel, unpacked, stays in the cache while the
// tiles pass.
template <bool kVnni, int kBits, int kSize>
void many_rows(const QuantizedRows& x, const PackedWeight& w, int64_t panel, int64_t panel_end, int64_t tile,
               int64_t tile_end, const float* bias, float* out, int64_t ldo) {
  static thread_local Scratch scratch;
  const int64_t full = slice_depth(w.k), panel_bytes = w.panel_bytes();
  int32_t* unpacked = static_cast<int32_t*>(scratch.bytes(full / 2 * kPanel * sizeof(int32_t)));
  for (int64_t k = 0; k < w.k; k += full) {
    const int64_t depth = at_most(full, w.k - k), block = k / kSize, blocks = depth / kSize;
    for (int64_t p = panel; p < panel_end; ++p) {
      const uint8_t* slice = w.data + p * panel_bytes + w.bytes_of(k);
      unpack_pairs<kBits>(slice, w.block_bytes(), blocks, kSize / 2, w.has_mins, unpacked);
      // While the tiles pass, the slice that comes next is fetched from memory, a few lines a tile.
      const uint8_t* next = p + 1 < panel_end ? slice + panel_bytes : w.data + panel * panel_bytes + w.bytes_of(k + depth);
      const int64_t lines = (w.bytes_of(depth) / 64 + tile_end - tile - 1) / (tile_end - tile) * 64;
      for (int64_t t = tile; t < tile_end; ++t, next += lines) {
        for (int64_t i = 0; i < lines; i += 64) __builtin_prefetch(next + i, 0, 2);
        const int64_t first = x.first(t);
        int step_columns = 0;
        const NearTileFn run = near_tile_of<kVnni, 0, kSize, kNearRows>(x.first(t + 1) - first, &step_columns);
        for (int column = 0; column < kPanel; column += step_columns) {
          const int64_t n = p * kPanel + column;
          if (n >= w.n) break;
          run({x.pairs_of(t, block), x.scales_of(t, block), slice, w.block_bytes(), unpacked, blocks, w.has_mins, k > 0, column, k + depth == w.k && bias ? bias + n : nullptr, out + first * ldo + n, ldo,
               w.n - n});
        }
      }
    }
  }
}

template <bool kVnni, int kBits, int kSize>
void product(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  static thread_local Scratch pairs, scales;
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock, blocks = w.k / kSize;
  for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
    const int64_t begin = rows * row_block / row_blocks, count = rows * (row_block + 1) / row_blocks - begin;
    const int64_t tiles = (count + kNearRows - 1) / kNearRows;
    const QuantizedRows q{static_cast<int32_t*>(pairs.bytes(count * blocks * kPairs * sizeof(int32_t))),
                          scales.floats(count * blocks * 2), count, tiles, blocks};
    const float* from = x + begin * w.k;
    float* to = out + begin * ldo;
    const auto quantize = [&](int64_t tile) {
      const int64_t first = q.first(tile), size = q.first(tile + 1) - first;
      quantize_rows<kSize>(from + first * w.k, size, w.k, q.pairs + first * blocks * kPairs, q.scales + first * blocks * 2);
    };
    if (tiles == 1) {
      quantize(0);
      few_rows<kVnni, kBits, kSize>(q, w, bias, to, ldo);
      continue;
    }
    parallel_for(tiles, quantize);
    const int64_t panels = w.panels();
    const int64_t groups = group_count(panels, 1);
    const int64_t cuts = row_cuts(tiles, groups);
    parallel_for(groups * cuts, [&](int64_t task) {
      const int64_t cut = task / groups, group = task % groups;  // neighbours share rows of x
      many_rows<kVnni, kBits, kSize>(q, w, panels * group / groups, panels * (group + 1) / groups, tiles * cut / cuts,
                              tiles * (cut + 1) / cuts, bias, to, ldo);
    });
  }
}

template <bool kVnni>
void linear_with(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  if (w.bits == 4) {
    return w.block_size == 32 ? product<kVnni, 4, 32>(x, rows, w, bias, out, ldo)
                              : product<kVnni, 4, 16>(x, rows, w, bias, out, ldo);
  }
  return w.block_size == 32 ? product<kVnni, 8, 32>(x, rows, w, bias, out, ldo)
                            : product<kVnni, 8, 16>(x, rows, w, bias, out, ldo);
}

void linear(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t out_stride,
            bool vnni) {
  if (rows == 0 || w.n == 0) return;
#if defined(UMA_ISA_AVX2) || defined(UMA_ISA_AVX512)
  if (vnni) return linear_with<true>(x, rows, w, bias, out, out_stride);
#else
  (void)vnni;
#endif
  linear_with<false>(x, rows, w, bias, out, out_stride);
}

}  // namespace

const NearLinearOps& near_linear_ops() {
  static const NearLinearOps ops = {linear};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
