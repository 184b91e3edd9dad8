#include "cpu/lora.h"

#include <cstring>

#include "cpu/linear_tile.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

constexpr int64_t kNarrow = 16;  // width of A's last panel where the rest of the rank fits into it

struct Adapter {
  int64_t rank, k, n;
  float scaling;
  const float* a;
  const float* b;
};

// Floats of A's rows once padded.
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
  const float* a = reinterpret_cast<const float*>(packed + sizeof(header));
  return {header.rank, header.k, header.n, header.scaling, a, a + padded_rank(header.rank) * header.k};
}

int64_t packed_bytes(int64_t rank, int64_t k, int64_t n) {
  return sizeof(LoraHeader) + sizeof(float) * (padded_rank(rank) * k + out_panels(n) * kPanel * rank);
}

// Rows [first, first + width) of a matrix [count][depth] as one panel.
void pack_panel(const float* matrix, int64_t count, int64_t depth, int64_t first, int64_t width, const float* zeros, float* to) {
  const float* rows[kPanel];
  for (int64_t j = 0; j < width; ++j) rows[j] = first + j < count ? matrix + (first + j) * depth : zeros;
  interleave_rows(rows, width, depth, to);
}

void pack(uint8_t* to, const LoraHeader& header, const float* a, const float* b) {
  static thread_local Scratch scratch;
  const int64_t longest = header.k > header.rank ? header.k : header.rank;
  const float* zeros = static_cast<const float*>(std::memset(scratch.floats(longest), 0, longest * sizeof(float)));
  std::memcpy(to, &header, sizeof(header));
  float* at = reinterpret_cast<float*>(to + sizeof(header));
  for (int64_t panel = 0; panel < rank_panels(header.rank); ++panel) {
    const int64_t width = panel_width(header.rank, panel);
    pack_panel(a, header.rank, header.k, panel * kPanel, width, zeros, at);
    at += width * header.k;
  }
  for (int64_t panel = 0; panel < out_panels(header.n); ++panel, at += kPanel * header.rank)
    pack_panel(b, header.n, header.rank, panel * kPanel, kPanel, zeros, at);
}

// Some rows of one adapter, in the order of rows: what passes through a site's factors together, while those are in the cache.
struct RowBlock {
  int64_t adapter, first, rows;
};
constexpr int64_t kBlockTiles = 4;      // of a block, at most
constexpr int64_t kExpandFloats = 4096;  // of B that all tiles of a block pass before the next: half of an L1 cache

// out = or += some rows of x times `panels` panels of `width` columns, `depth` of their `stride` k. Rows of x are read where
// they lie: with few columns, bringing them side by side would cost as much as the product.
struct RowsStep {
  const float* const* x;
  const float* weights;
  int64_t width, depth, stride, panels;
  float* const* out;
  int64_t columns;  // from `out` to the row's end
  bool add;
};

// Out of line: inlined among others, its pointers would not stay in registers.
template <int kRows, int kV>
__attribute__((noinline)) void rows_tile(const RowsStep& step) {
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = step.x[r];
  const int64_t depth = step.depth, width = step.width;
  int64_t at = 0;  // columns done
  for (int64_t p = 0; p < step.panels; ++p) {
    for (int64_t column = 0; column < width && at < step.columns; column += kV * kLanes, at += kV * kLanes) {
      vf sums[kRows][kV] = {};
      const float* weights = step.weights + p * width * step.stride + column;
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

template <int kRows>
void rows_step(int rows, const RowsStep& step) {
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
void shrink(const Adapter& adapter, const float* x, const int32_t* order, int64_t rows, float* shrunk) {
  const int64_t slice = slice_depth(adapter.k), ld = padded_rank(adapter.rank);
  for (int64_t panel = 0; panel < rank_panels(adapter.rank); ++panel) {
    const int64_t column = panel * kPanel, width = panel_width(adapter.rank, panel);
    for (int64_t k = 0; k < adapter.k; k += slice) {
      const float* weights = adapter.a + column * adapter.k + k * width;
      const int64_t depth = slice < adapter.k - k ? slice : adapter.k - k;
      for_tiles(rows, [&](int64_t first, int count) {
        const float* from[kTileRows];
        float* to[kTileRows];
        for (int r = 0; r < count; ++r) {
          from[r] = x + order[first + r] * adapter.k + k;
          to[r] = shrunk + (first + r) * ld + column;
        }
        rows_step<kTileRows>(count, {from, weights, width, depth, depth, 1, to, width, k > 0});
      });
    }
  }
  for (int64_t i = 0; i < rows * ld; i += kLanes) store(shrunk + i, load(shrunk + i) * adapter.scaling);
}

// The columns of panels [panel, end) of row order[i] of out += shrunk[i] B^T.
void expand(const Adapter& adapter, const float* shrunk, const int32_t* order, int64_t rows, int64_t panel, int64_t end,
            float* out, int64_t out_stride) {
  const int64_t slice = slice_depth(adapter.rank), ld = padded_rank(adapter.rank);
  const int64_t most = kExpandFloats / (kPanel * adapter.rank) + 1;
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
        const float* weights = adapter.b + n * adapter.rank + k * kPanel;
        rows_step<kTileRows>(count, {from, weights, kPanel, depth, adapter.rank, panels, to, adapter.n - n, true});
      }
    });
  }
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
