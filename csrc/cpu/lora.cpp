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

// Rows of one adapter that pass through the kernels together.
struct RowTile {
  int64_t adapter;
  int64_t first;  // in the order of rows
  int rows;
};

// out = or += x times one panel, `width` columns of it; the rows of x are interleaved.
void product(const float* x, int rows, const float* panel, int64_t width, int64_t depth, float* const* out, int64_t columns,
             bool add) {
  const int64_t slice = slice_depth(depth);
  for (int64_t column = 0; column < width && column < columns; column += kTileVecs * kLanes) {
    float* to[kTileRows];
    for (int r = 0; r < rows; ++r) to[r] = out[r] + column;
    for (int64_t k = 0; k < depth; k += slice) {
      const TileStep step{x + k * rows, panel + k * width + column, width, slice < depth - k ? slice : depth - k, to,
                          columns - column, {add || k > 0, nullptr}};
      if (width - column >= kTileVecs * kLanes)
        Tiles<kTileVecs>::of(rows)(step);
      else
        Tiles<1>::of(rows)(step);  // 16 columns where one vector holds them
    }
  }
}

// shrunk[r][i] = scaling * (x A^T) of row i of the tile, r in the rows [panel * 32, ...) of A of panels [panel, panel_end).
void shrink(const Adapter& adapter, const float* x, const int32_t* order, int rows, int64_t panel, int64_t panel_end,
            float* shrunk) {
  static thread_local Scratch scratch;
  const float* from[kTileRows] = {};
  for (int i = 0; i < rows; ++i) from[i] = x + order[i] * adapter.k;
  const float* tiled = from[0];
  if (rows > 1) {
    float* to = scratch.floats(rows * adapter.k);
    interleave_rows(from, rows, adapter.k, to);
    tiled = to;
  }
  for (; panel < panel_end; ++panel) {
    const int64_t first = panel * kPanel, width = panel_width(adapter.rank, panel);
    const int64_t count = adapter.rank - first < width ? adapter.rank - first : width;
    float sums[kTileRows][kPanel];
    float* to[kTileRows];
    for (int i = 0; i < rows; ++i) to[i] = sums[i];
    product(tiled, rows, adapter.a + first * adapter.k, width, adapter.k, to, width, false);
    for (int64_t r = 0; r < count; ++r)
      for (int i = 0; i < rows; ++i) shrunk[(first + r) * rows + i] = adapter.scaling * sums[i][r];
  }
}

void expand(const Adapter& adapter, const float* shrunk, const int32_t* order, int rows, int64_t panel, int64_t panel_end,
            float* out, int64_t out_stride) {
  for (; panel < panel_end; ++panel) {
    const int64_t n = panel * kPanel;
    float* to[kTileRows];
    for (int i = 0; i < rows; ++i) to[i] = out + order[i] * out_stride + n;
    product(shrunk, rows, adapter.b + n * adapter.rank, kPanel, adapter.rank, to, adapter.n - n, true);
  }
}

void lora(const float* x, float* out, int64_t out_stride, const uint8_t* const* adapters, const int32_t* offsets,
          int64_t count, const int32_t* order) {
  static thread_local Scratch tile_memory, shrunk_memory;
  int64_t tiles = 0, rank = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (adapters[i] == nullptr) continue;
    tiles += tile_count(offsets[i + 1] - offsets[i]);
    const int64_t own = unpack(adapters[i]).rank;
    rank = own > rank ? own : rank;
  }
  if (tiles == 0) return;
  RowTile* tile = static_cast<RowTile*>(tile_memory.bytes(tiles * sizeof(RowTile)));
  for (int64_t i = 0, next = 0; i < count; ++i) {
    const int64_t rows = offsets[i + 1] - offsets[i], own = tile_count(rows);
    for (int64_t t = 0; adapters[i] != nullptr && t < own; ++t) {
      const int64_t begin = tile_begin(rows, own, t);
      tile[next++] = {i, offsets[i] + begin, static_cast<int>(tile_begin(rows, own, t + 1) - begin)};
    }
  }
  float* shrunk = shrunk_memory.floats((offsets[count] - offsets[0]) * rank);
  const auto shrunk_of = [&](const RowTile& t) { return shrunk + (t.first - offsets[0]) * rank; };

  // Few tiles (decoding): their columns are divided too, or one thread would read an adapter alone.
  const int64_t cuts = tiles >= 2 * get_num_threads() ? 1 : 2 * get_num_threads();
  parallel_for(tiles * cuts, [&](int64_t task) {
    const RowTile& t = tile[task / cuts];
    const Adapter adapter = unpack(adapters[t.adapter]);
    const int64_t panels = rank_panels(adapter.rank), cut = task % cuts;
    const int64_t begin = panels * cut / cuts, end = panels * (cut + 1) / cuts;
    if (begin < end) shrink(adapter, x, order + t.first, t.rows, begin, end, shrunk_of(t));
  });
  parallel_for(tiles * cuts, [&](int64_t task) {
    const RowTile& t = tile[task / cuts];
    const Adapter adapter = unpack(adapters[t.adapter]);
    const int64_t panels = out_panels(adapter.n), cut = task % cuts;
    expand(adapter, shrunk_of(t), order + t.first, t.rows, panels * cut / cuts, panels * (cut + 1) / cuts,
           out, out_stride);
  });
}

}  // namespace

const LoraOps& lora_ops() {
  static const LoraOps ops = {packed_bytes, pack, lora};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
