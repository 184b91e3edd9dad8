#include "cpu/linear_fast.h"

#include "cpu/linear_fast_tile.h"
#include "cpu/linear_work.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {

namespace {

using FastTileFn = void (*)(const FastStep&);

// Rows of x as tiles read them: tile t has size(t) rows from first(t) on.
struct ByteRows {
  int32_t* quads;
  float* parameters;
  Outlier* outliers;  // `blocks` places for each row
  int32_t* outlier_counts;
  int64_t rows, blocks, block_quads;  // blocks: of one row
  int64_t tiles = (rows + kFastRows - 1) / kFastRows, smaller = rows / tiles, larger_tiles = rows % tiles;

  int64_t size(int64_t tile) const { return smaller + (tile < larger_tiles); }
  int64_t first(int64_t tile) const { return smaller * tile + at_most(tile, larger_tiles); }
  int64_t block_at(int64_t tile, int64_t block) const { return first(tile) * blocks + block * size(tile); }
  int32_t* quads_of(int64_t tile, int64_t block) const { return quads + block_at(tile, block) * block_quads; }
  float* parameters_of(int64_t tile, int64_t block) const { return parameters + block_at(tile, block) * kFastParameters; }
};

// Depth of all slices of K but the last: an unpacked panel of that depth (20 KiB at most) stays in the L1 cache beside a
// tile's rows. About equal, whole blocks.
int64_t unpacked_depth(int64_t k) {
  const int64_t slices = (k + 639) / 640;
  return ((k + slices - 1) / slices + 31) / 32 * 32;
}

// Sets rows first .. first + count - 1 of `out` to the products of their outliers, if any of them has one: true then.
template <int kBits>
bool begin_with_outliers(const ByteRows& x, int64_t first, int64_t count, const PackedWeight& w, int64_t panel, float* out,
                         int64_t ldo) {
  int32_t any = 0;
  for (int64_t r = first; r < first + count; ++r) any |= x.outlier_counts[r];
  if (any == 0) return false;
  for (int64_t r = first; r < first + count; ++r, out += ldo)
    outlier_sums<kBits>(x.outliers + r * x.blocks, x.outlier_counts[r], w.data + panel * w.panel_bytes(), w.block_bytes(),
                        w.has_mins, out, w.n - panel * kPanel);
  return true;
}

template <bool kVnni_, int kBits_, int kSize_>
struct FastKind {
  static constexpr bool kVnni = kVnni_;
  static constexpr int kBits = kBits_, kSize = kSize_;
};

// The tile for `rows` rows, at most kRows.
template <typename Kind, bool kDirect, int kRows>
FastTileFn fast_tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return fast_tile_of<Kind, kDirect, kRows - 1>(rows);
  }
  return fast_tile<Kind::kVnni, Kind::kBits, Kind::kSize, kDirect, kRows>;
}

// A whole product of very few rows: the packed weight streams by once and is unpacked in registers.
template <typename Kind>
void few_rows(const ByteRows& x, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  const FastTileFn run = fast_tile_of<Kind, true, kDirectRows>(x.rows);
  const int64_t panels = w.panels();
  const int64_t groups = w.n * w.k * x.rows < kSerialWork ? 1 : group_count(panels, 6);
  parallel_for(groups, [&](int64_t group) {
    for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; ++p) {
      const int64_t n = p * kPanel;
      const bool begun = begin_with_outliers<Kind::kBits>(x, 0, x.rows, w, p, out + n, ldo);
      run({x.quads, x.parameters, w.data + p * w.panel_bytes(), w.block_bytes(), nullptr, x.blocks, w.has_mins, begun,
           bias ? bias + n : nullptr, out + n, ldo, w.n - n});
    }
  });
}

// Tiles [tile, tile_end) of x times panels [panel, panel_end). A slice of a panel, unpacked, stays in the cache while the
// tiles pass.
template <typename Kind>
void many_rows(const ByteRows& x, const PackedWeight& w, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end,
               const float* bias, float* out, int64_t ldo) {
  static thread_local Scratch scratch;
  const int64_t full = unpacked_depth(w.k), panel_bytes = w.panel_bytes(), block_bytes = w.block_bytes();
  int32_t* unpacked = static_cast<int32_t*>(scratch.bytes(full * kPanel));
  for (int64_t k = 0; k < w.k; k += full) {
    const int64_t depth = at_most(full, w.k - k), block = k / w.block_size, blocks = depth / w.block_size;
    for (int64_t p = panel; p < panel_end; ++p) {
      const int64_t n = p * kPanel;
      const uint8_t* slice = w.data + p * panel_bytes + w.bytes_of(k);
      unpack_quads<Kind::kBits>(slice, block_bytes, blocks, Kind::kSize / 4, w.has_mins, unpacked);
      // While the tiles pass, the slice that comes next is fetched from memory, a few lines a tile.
      const uint8_t* next = p + 1 < panel_end ? slice + panel_bytes : w.data + panel * panel_bytes + w.bytes_of(k + depth);
      const int64_t lines = (w.bytes_of(depth) / 64 + tile_end - tile - 1) / (tile_end - tile) * 64;
      for (int64_t t = tile; t < tile_end; ++t, next += lines) {
        for (int64_t i = 0; i < lines; i += 64) __builtin_prefetch(next + i, 0, 2);
        const int64_t first = x.first(t);
        const FastTileFn run = fast_tile_of<Kind, false, kFastRows>(x.size(t));
        float* to = out + first * ldo + n;
        const bool begun = k > 0 || begin_with_outliers<Kind::kBits>(x, first, x.size(t), w, p, to, ldo);
        run({x.quads_of(t, block), x.parameters_of(t, block), slice, block_bytes, unpacked, blocks, w.has_mins, begun,
             k + depth == w.k && bias ? bias + n : nullptr, to, ldo, w.n - n});
      }
    }
  }
}

template <typename Kind>
void product(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  static thread_local Scratch quads, parameters, outliers, outlier_counts;
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock, blocks = w.k / Kind::kSize;
  for (int64_t row_block = 0; row_block < row_blocks; ++row_block) {
    const int64_t begin = rows * row_block / row_blocks, count = rows * (row_block + 1) / row_blocks - begin;
    const ByteRows q{static_cast<int32_t*>(quads.bytes(count * w.k)), parameters.floats(count * blocks * kFastParameters),
                     static_cast<Outlier*>(outliers.bytes((count * blocks + 1) * sizeof(Outlier))),
                     static_cast<int32_t*>(outlier_counts.bytes(count * sizeof(int32_t))), count, blocks, Kind::kSize / 4};
    const int64_t tiles = q.tiles;
    const float* from = x + begin * w.k;
    float* to = out + begin * ldo;
    const auto quantize = [&](int64_t tile) {
      const int64_t first = q.first(tile);
      quantize_rows_8<Kind::kSize>(from + first * w.k, q.size(tile), w.k, q.quads_of(tile, 0), q.parameters_of(tile, 0),
                                   q.outliers + first * blocks, q.outlier_counts + first);
    };
    if (count <= kDirectRows) {
      quantize(0);
      few_rows<Kind>(q, w, bias, to, ldo);
      continue;
    }
    if (tiles == 1) {
      quantize(0);
    } else {
      parallel_for(tiles, quantize);
    }
    const int64_t panels = w.panels();
    const int64_t groups = w.n * w.k * count < kSerialWork ? 1 : group_count(panels, 1);
    const int64_t cuts = row_cuts(tiles, groups);
    parallel_for(groups * cuts, [&](int64_t task) {
      const int64_t cut = task / groups, group = task % groups;  // neighbours share rows of x
      many_rows<Kind>(q, w, panels * group / groups, panels * (group + 1) / groups, tiles * cut / cuts,
                      tiles * (cut + 1) / cuts, bias, to, ldo);
    });
  }
}

template <bool kVnni>
void linear_with(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t ldo) {
  if (w.bits == 4) {
    return w.block_size == 32 ? product<FastKind<kVnni, 4, 32>>(x, rows, w, bias, out, ldo)
                              : product<FastKind<kVnni, 4, 16>>(x, rows, w, bias, out, ldo);
  }
  return w.block_size == 32 ? product<FastKind<kVnni, 8, 32>>(x, rows, w, bias, out, ldo)
                            : product<FastKind<kVnni, 8, 16>>(x, rows, w, bias, out, ldo);
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

const FastLinearOps& fast_linear_ops() {
  static const FastLinearOps ops = {linear};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
