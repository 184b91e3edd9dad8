// How the work of a matrix product is divided. Knows panels and threads; does not know arithmetic.
#pragma once
#include <cstdint>

#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

constexpr int64_t kRowBlock = 512;    // rows of x prepared at a time: bounds the memory of one call
constexpr int64_t kCachedTiles = 22;  // of a product's rows
constexpr int64_t kSerialWork = 1 << 15;  // multiply-adds below which a second thread costs more than it brings

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Number of groups that `items` are cut into: some for each thread, so that they end together; all sizes within one.
static inline int64_t group_count(int64_t items, int64_t target_size) {
  const int64_t threads = get_num_threads();
  const int64_t groups = threads * ((items + threads * target_size - 1) / (threads * target_size));
  return at_most(items, groups);
}

// Number of pieces that the `tiles` of a product's rows are cut into: so few rows a piece that they stay in the L2 cache while a
// group of panels passes, and some tasks for each thread.
static inline int64_t row_cuts(int64_t tiles, int64_t groups) {
  const int64_t cached = (tiles + kCachedTiles - 1) / kCachedTiles;
  const int64_t shared = at_most(tiles, (2 * get_num_threads() + groups - 1) / groups);
  return cached > shared ? cached : shared;
}

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
