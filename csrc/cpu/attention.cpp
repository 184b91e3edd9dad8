// Attention with an online softmax over tiles of keys (arXiv 1805.02867, 2307.08691).
//
// A tile holds the keys of path positions 64 t .. 64 t + 63. A query's tiles are walked in ascending order and each is
// reduced in an order of its own, so that a row's bits depend on its position and its context alone: not on how a
// segment was cut into chunks, where its keys lie, its neighbours, or the threads.
//
// One task owns the queries of some positions of a chunk and one key-value head: their rows, all heads of the group
// packed together, are read against a tile that is gathered once into the first-level cache, keys transposed.
#include "cpu/attention.h"

#include "cpu/attention_lanes.h"
#include "uma/scratch.h"
#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int kTile = 64;        // keys in a tile
constexpr int kDepth = 64;       // elements of a head in one block of a score
constexpr int kMaxHeadDim = 256;
constexpr int kTaskRows = 192;   // query rows of a task: their scaled copy and results stay in the second-level cache
constexpr int kRows = 6;         // rows of a register tile: kRows x kVectors accumulators, kVectors + 1 operands
#if defined(UMA_ISA_AVX512)
constexpr int kVectors = 4;      // of 32 registers
#else
constexpr int kVectors = 2;      // of 16 registers
#endif
constexpr float kMinusInfinity = -__builtin_inff();

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the key of a path position lies: a list of slots is a block table with blocks of one.
struct Context {
  const int32_t* table;
  int64_t block_size;

  int64_t slot(int64_t position) const {
    if (block_size == 1) return table[position];
    return int64_t(table[position / block_size]) * block_size + position % block_size;
  }
};

struct Task {
  Context context;
  int64_t row;        // of q and out: the first query
  int64_t positions;  // how many queries, one a path position
  int64_t first;      // path position of the first
  int64_t kv_head;
};

// c[r][n] (+)= sum over k, in order, of a[r][k] * b[k][n], for R rows and NV vectors of columns. The sum is complete
// before it is added: rounding errors grow with the depth of one block and the number of blocks, not their product.
template <bool Accumulate, int R, int NV>
void product_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  vf sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[r][n] = vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf column[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) column[n] = load(b + k * ldb + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf factor = splat(a[r * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[r][n] += factor * column[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      float* to = c + r * ldc + n * kLanes;
      store(to, Accumulate ? load(to) + sum[r][n] : sum[r][n]);
    }
}

template <bool Accumulate, int R>
void product_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                  int64_t vectors) {
  int64_t n = 0;
  for (; n + kVectors <= vectors; n += kVectors)
    product_tile<Accumulate, R, kVectors>(a, lda, b + n * kLanes, ldb, c + n * kLanes, ldc, depth);
  if constexpr (kVectors == 4) {
    if (vectors - n == 3) product_tile<Accumulate, R, 3>(a, lda, b + n * kLanes, ldb, c + n * kLanes, ldc, depth);
    if (vectors - n == 2) product_tile<Accumulate, R, 2>(a, lda, b + n * kLanes, ldb, c + n * kLanes, ldc, depth);
  }
  if (vectors - n == 1) product_tile<Accumulate, R, 1>(a, lda, b + n * kLanes, ldb, c + n * kLanes, ldc, depth);
}

template <bool Accumulate>
void product(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
             int64_t vectors) {
  switch (rows) {
    case 1: return product_rows<Accumulate, 1>(a, lda, b, ldb, c, ldc, depth, vectors);
    case 2: return product_rows<Accumulate, 2>(a, lda, b, ldb, c, ldc, depth, vectors);
    case 3: return product_rows<Accumulate, 3>(a, lda, b, ldb, c, ldc, depth, vectors);
    case 4: return product_rows<Accumulate, 4>(a, lda, b, ldb, c, ldc, depth, vectors);
    case 5: return product_rows<Accumulate, 5>(a, lda, b, ldb, c, ldc, depth, vectors);
    default: return product_rows<Accumulate, kRows>(a, lda, b, ldb, c, ldc, depth, vectors);
  }
}

// The rows of one task and the tile it works on.
struct Work {
  int64_t dim, width;  // head_dim, and head_dim rounded up to whole vectors
  float* q;            // [rows][dim], scaled
  float* out;          // [rows][width], not yet divided by the sum of weights
  float* largest;      // [rows] running maximum of the scores
  float* total;        // [rows][kLanes] running sum of the weights, lane by lane
  float* keys;         // [dim][kTile]
  float* values;       // [kTile][width]
  float* scores;       // [kRows][kTile]

  Work(int64_t rows, int64_t head_dim) : dim(head_dim), width(round_up(head_dim, kLanes)) {
    const int64_t sizes[] = {rows * dim, rows * width, rows, rows * kLanes, dim * kTile, kTile * width, kRows * kTile};
    float** parts[] = {&q, &out, &largest, &total, &keys, &values, &scores};
    int64_t floats = 0;
    for (int64_t size : sizes) floats += round_up(size, 16);
    static thread_local Scratch scratch;
    float* memory = scratch.floats(static_cast<size_t>(floats));
    for (int i = 0; i < 7; ++i) {
      *parts[i] = memory;
      memory += round_up(sizes[i], 16);
    }
    for (int64_t i = 0; i < rows * width; ++i) out[i] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) largest[i] = kMinusInfinity;
    for (int64_t i = 0; i < rows * kLanes; ++i) total[i] = 0.0f;
    if (width != dim)
      for (int64_t i = 0; i < kTile * width; ++i) values[i] = 0.0f;
  }
};

// Keys [begin, end) of the tile: keys transposed into whole vectors (absent ones zero), values as rows.
void gather_tile(const AttentionArgs& args, const Task& task, int64_t tile, int64_t begin, int64_t end, Work& work) {
  static const float zeros[kMaxHeadDim] = {};
  const int64_t stride = args.kv_heads * args.head_dim, head = task.kv_head * args.head_dim;
  const float* key_rows[kTile];
  for (int64_t j = 0; j < kTile; ++j) key_rows[j] = zeros;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t slot = task.context.slot(tile * kTile + j);
    key_rows[j] = (slot >= 0 ? args.k_cache + slot * stride : args.k + (-slot - 1) * args.k_stride) + head;
    const float* value = (slot >= 0 ? args.v_cache + slot * stride : args.v + (-slot - 1) * args.v_stride) + head;
    float* to = work.values + j * work.width;
    int64_t d = 0;
    for (; d + kLanes <= work.dim; d += kLanes) store(to + d, load(value + d));
    for (; d < work.dim; ++d) to[d] = value[d];
  }
  for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes)
    transpose_rows(key_rows + j, work.dim, work.keys + j, kTile);
}

// What one row sees of the tile: keys [low, high).
struct Seen {
  int64_t low, high;
};

// Scores -> weights e^(score - largest) in place, 0 for a key that the row does not see (its score may hold anything).
// Updates each row's maximum, sum and unfinished result.
void softmax_rows(int64_t row, int rows, const Seen* seen, Work& work) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vf base[kRows];
  float before[kRows];
  for (int r = 0; r < rows; ++r) {
    float* scores = work.scores + r * kTile;
    if (seen[r].low > 0 || seen[r].high < kTile) {
      const int32_t low = static_cast<int32_t>(seen[r].low), high = static_cast<int32_t>(seen[r].high);
      for (int j = 0; j < kTile; j += kLanes) {
        const vi key = lane + j;
        store(scores + j, ((key >= low) & (key < high)) ? load(scores + j) : splat(kMinusInfinity));
      }
    }
    before[r] = work.largest[row + r];
    vf most = splat(before[r]);
    for (int j = 0; j < kTile; j += kLanes) most = larger(load(scores + j), most);
    most = largest_lane(most);
    work.largest[row + r] = most[0];
    base[r] = most == kMinusInfinity ? vf{} : most;  // no key seen yet: -inf - 0, not -inf + inf
  }
  for (int r = 0; r < rows; ++r) {
    float* scores = work.scores + r * kTile;
    float* total = work.total + (row + r) * kLanes;
    vf sum = {};
    for (int j = 0; j < kTile; j += kLanes) {
      const vf weight = exp_nonpositive(load(scores + j) - base[r]);
      store(scores + j, weight);
      sum += weight;
    }
    if (before[r] == work.largest[row + r]) {  // the factor would be 1
      store(total, load(total) + sum);
      continue;
    }
    const vf factor = exp_nonpositive(before[r] - base[r]);
    store(total, load(total) * factor + sum);
    float* out = work.out + (row + r) * work.width;
    for (int64_t d = 0; d < work.width; d += kLanes) store(out + d, load(out + d) * factor);
  }
}

// kRows rows, or what is left of them, against the gathered tile.
void attend_rows(const AttentionArgs& args, const Task& task, int64_t tile, int64_t row, int rows, Work& work) {
  const int64_t group = args.heads / args.kv_heads;
  Seen seen[kRows];
  int64_t position = task.first + row / group - tile * kTile, head = row % group;
  for (int r = 0; r < rows; ++r) {
    seen[r] = {args.window ? max64(position - args.window + 1, 0) : 0, min64(position + 1, kTile)};
    if (++head == group) {
      head = 0;
      ++position;
    }
  }
  const int64_t low = seen[0].low, high = seen[rows - 1].high;  // what any of the rows sees
  if (low >= high) return;
  const int64_t begin = low / kLanes * kLanes, end = round_up(high, kLanes);
  const int64_t vectors = (end - begin) / kLanes;
  product<false>(rows, work.q + row * work.dim, work.dim, work.keys + begin, kTile, work.scores + begin, kTile,
                 min64(work.dim, kDepth), vectors);
  for (int64_t d = kDepth; d < work.dim; d += kDepth)
    product<true>(rows, work.q + row * work.dim + d, work.dim, work.keys + d * kTile + begin, kTile,
                  work.scores + begin, kTile, min64(work.dim - d, kDepth), vectors);
  softmax_rows(row, rows, seen, work);
  product<true>(rows, work.scores + low, kTile, work.values + low * work.width, work.width, work.out + row * work.width,
                work.width, high - low, work.width / kLanes);
}

void run_task(const AttentionArgs& args, const Task& task) {
  const int64_t group = args.heads / args.kv_heads, dim = args.head_dim, rows = task.positions * group;
  const int64_t out_stride = args.heads * dim, head = task.kv_head * group * dim;
  Work work(rows, dim);
  for (int64_t p = 0; p < task.positions; ++p) {
    const float* from = args.q + (task.row + p) * args.q_stride + head;
    float* to = work.q + p * group * dim;
    for (int64_t i = 0; i < group * dim; ++i) to[i] = from[i] * args.scale;
  }
  const int64_t last = task.first + task.positions - 1;
  const int64_t oldest = args.window ? max64(task.first - args.window + 1, 0) : 0;
  for (int64_t tile = oldest / kTile; tile <= last / kTile; ++tile) {
    gather_tile(args, task, tile, max64(oldest - tile * kTile, 0), min64(last + 1 - tile * kTile, kTile), work);
    for (int64_t row = 0; row < rows; row += kRows)
      attend_rows(args, task, tile, row, static_cast<int>(min64(kRows, rows - row)), work);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float total = reduce_add(load(work.total + row * kLanes));
    const float* from = work.out + row * work.width;
    float* to = args.out + (task.row + row / group) * out_stride + head + row % group * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = from[d] / total;
  }
}

int64_t tree(const AttentionArgs& args, const int32_t* cu_q, const int32_t* cu_k, const int32_t* slots, int64_t chunks) {
  for (int64_t i = 0; i < cu_k[chunks]; ++i)
    if (slots[i] < -args.rows || slots[i] >= args.num_slots) return i;

  const int64_t group = args.heads / args.kv_heads, most = max64(kTaskRows / group, 1);
  int64_t pieces = 0;
  for (int64_t n = 0; n < chunks; ++n) pieces += (cu_q[n + 1] - cu_q[n] + most - 1) / most;
  // A piece is some positions of a chunk: (chunk, first query, queries), the ones with the most keys first.
  static thread_local Scratch scratch;
  int32_t* const plan = static_cast<int32_t*>(scratch.bytes(static_cast<size_t>(pieces) * 3 * sizeof(int32_t)));
  int32_t* piece = plan;
  for (int64_t n = 0; n < chunks; ++n) {
    const int64_t queries = cu_q[n + 1] - cu_q[n], cuts = (queries + most - 1) / most;
    for (int64_t cut = cuts - 1; cut >= 0; --cut, piece += 3) {
      const int64_t begin = queries * cut / cuts, end = queries * (cut + 1) / cuts;
      piece[0] = static_cast<int32_t>(n);
      piece[1] = static_cast<int32_t>(begin);
      piece[2] = static_cast<int32_t>(end - begin);
    }
  }
  parallel_for(pieces * args.kv_heads, [&](int64_t index) {
    const int32_t* p = plan + index / args.kv_heads * 3;
    const int64_t n = p[0], context = cu_k[n + 1] - cu_k[n], queries = cu_q[n + 1] - cu_q[n];
    run_task(args, {{slots + cu_k[n], 1}, cu_q[n] + p[1], p[2], context - queries + p[1], index % args.kv_heads});
  });
  return -1;
}

int64_t paged_decode(const AttentionArgs& args, const int32_t* block_table, const int32_t* context_lens, int64_t blocks,
                     int64_t block_size) {
  for (int64_t b = 0; b < args.rows; ++b) {
    const int64_t length = context_lens[b];
    if (length < 1 || length > blocks * block_size) return b;
    for (int64_t i = 0; i * block_size < length; ++i) {
      const int64_t block = block_table[b * blocks + i], used = min64(block_size, length - i * block_size);
      if (block < 0 || block * block_size + used > args.num_slots) return b;
    }
  }
  parallel_for(args.rows * args.kv_heads, [&](int64_t index) {
    const int64_t b = index / args.kv_heads;
    run_task(args, {{block_table + b * blocks, block_size}, b, 1, context_lens[b] - 1, index % args.kv_heads});
  });
  return -1;
}

}  // namespace

const AttentionOps& attention_ops() {
  static const AttentionOps ops = {tree, paged_decode};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
