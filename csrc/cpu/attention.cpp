// Attention with an online softmax over tiles of keys (arXiv 1805.02867, 2307.08691).
//
// A tile holds the keys of path positions 64 t .. 64 t + 63, a split those of four tiles. A query's tiles are walked in
// ascending order inside a split, and its splits are joined from the front, so that a row's bits depend on its position
// and its context alone: not on how a segment was cut into chunks, where its keys lie, its neighbours, or the threads.
//
// One task owns the queries of some positions of a chunk and one key-value head: their rows, all heads of the group
// packed together, are read against a tile that is gathered once into the first-level cache, keys transposed. Few rows
// read the values where they lie and fetch the next tile meanwhile. Decoding reads memory more than it computes: a task
// takes all heads of the keys it reads, since single heads reach half the bandwidth, and may be one split of a row.
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
constexpr int kSplit = 256;      // keys that are reduced on their own and then joined: a task of a long context
constexpr int kTaskRows = 480;   // query rows of a task: their scaled copy and results stay in the second-level cache
constexpr int kRows = 6;         // rows of a register tile: kRows x kVectors accumulators, kVectors + 1 operands
#if defined(UMA_ISA_AVX512)
constexpr int kVectors = 4;      // of 32 registers
#else
constexpr int kVectors = 2;      // of 16 registers
#endif
constexpr int kInPlaceRows = 2 * kRows;
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
  int64_t kv_head;    // the first
  int64_t kv_heads;   // how many of them
};

// Rows of the right operand of a product: at one stride, or each where its pointer says, and what to fetch meanwhile.
struct Strided {
  const float* first;
  int64_t stride;

  const float* row(int64_t k) const { return first + k * stride; }
  void fetch(int64_t, int64_t) const {}
};
struct Scattered {
  const float* const* rows;
  const float* const* next;  // null: none
  int64_t offset;            // of the columns, in each

  const float* row(int64_t k) const { return rows[k] + offset; }
  void fetch(int64_t k, int64_t column) const {
    if (next) __builtin_prefetch(next[k] + offset + column, 0, 2);
  }
};

// c[r][n] (+)= sum over k, in order, of a[r][k] * b[k][n], for R rows and NV vectors of columns. The sum is complete
// before it is added: rounding errors grow with the depth of one block and the number of blocks, not their product.
template <bool Accumulate, int R, int NV, typename B>
void product_tile(const float* a, int64_t lda, const B& b, int64_t column, float* c, int64_t ldc, int64_t depth) {
  vf sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[r][n] = vf{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = b.row(k) + column;
    b.fetch(k, column);
    vf right[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) right[n] = load(from + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf factor = splat(a[r * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[r][n] += factor * right[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      float* to = c + r * ldc + column + n * kLanes;
      store(to, Accumulate ? load(to) + sum[r][n] : sum[r][n]);
    }
}

template <bool Accumulate, int R, typename B>
void product_rows(const float* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t depth, int64_t vectors) {
  int64_t n = 0;
  for (; n + kVectors <= vectors; n += kVectors)
    product_tile<Accumulate, R, kVectors>(a, lda, b, n * kLanes, c, ldc, depth);
  if constexpr (kVectors == 4) {
    if (vectors - n == 3) product_tile<Accumulate, R, 3>(a, lda, b, n * kLanes, c, ldc, depth);
    if (vectors - n == 2) product_tile<Accumulate, R, 2>(a, lda, b, n * kLanes, c, ldc, depth);
  }
  if (vectors - n == 1) product_tile<Accumulate, R, 1>(a, lda, b, n * kLanes, c, ldc, depth);
}

template <bool Accumulate, typename B>
void product(int rows, const float* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t depth, int64_t vectors) {
  switch (rows) {
    case 1: return product_rows<Accumulate, 1>(a, lda, b, c, ldc, depth, vectors);
    case 2: return product_rows<Accumulate, 2>(a, lda, b, c, ldc, depth, vectors);
    case 3: return product_rows<Accumulate, 3>(a, lda, b, c, ldc, depth, vectors);
    case 4: return product_rows<Accumulate, 4>(a, lda, b, c, ldc, depth, vectors);
    case 5: return product_rows<Accumulate, 5>(a, lda, b, c, ldc, depth, vectors);
    default: return product_rows<Accumulate, kRows>(a, lda, b, c, ldc, depth, vectors);
  }
}

// Unfinished results of some rows: what the keys so far give, relative to the largest score among them.
struct State {
  float* out;      // [rows][width], not yet divided by the sum of weights
  float* total;    // [rows][kLanes] sum of the weights, lane by lane
  float* largest;  // [rows] maximum of the scores

  static int64_t floats(int64_t rows, int64_t width) { return rows * (width + kLanes) + round_up(rows, 16); }

  State() = default;
  State(float* memory, int64_t rows, int64_t width)
      : out(memory), total(out + rows * width), largest(total + rows * kLanes) {}

  void clear(int64_t rows, int64_t width) const {
    for (int64_t i = 0; i < rows * (width + kLanes); ++i) out[i] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) largest[i] = kMinusInfinity;
  }
};

// Where the keys and values of a tile lie, those of the task's first head.
struct TileRows {
  const float* keys[kTile];
  const float* values[kTile];
};

// The rows of one task, those of each key-value head together, and the tile it works on.
struct Work {
  int64_t rows, head_rows;   // of all key-value heads of the task, and of one
  int64_t dim, width;        // head_dim, and head_dim rounded up to whole vectors
  float* q;                  // [rows][dim], scaled
  float* keys;               // [dim][kTile]
  float* values;             // [kTile][width]
  float* scores;             // [kRows][kTile]
  State split, joined;       // of the split at work, and of those before it

  Work(const AttentionArgs& args, const Task& task)
      : rows(task.positions * task.kv_heads * (args.heads / args.kv_heads)), head_rows(rows / task.kv_heads),
        dim(args.head_dim), width(round_up(dim, kLanes)) {
    const int64_t state = round_up(State::floats(rows, width), 16);
    const int64_t sizes[] = {round_up(rows * dim, 16), dim * kTile, kTile * width, kRows * kTile, state, state};
    int64_t floats = 0;
    for (int64_t size : sizes) floats += size;
    static thread_local Scratch scratch;
    q = scratch.floats(static_cast<size_t>(floats));
    keys = q + sizes[0];
    values = keys + sizes[1];
    scores = values + sizes[2];
    split = State(scores + sizes[3], rows, width);
    joined = State(split.out + state, rows, width);
    if (width != dim)
      for (int64_t i = 0; i < kTile * width; ++i) values[i] = 0.0f;
  }

  // Values may be read where they lie: no row is read often enough to pay for a copy, and none is short of a vector.
  bool in_place() const { return head_rows <= kInPlaceRows && width == dim; }
};

// Finds keys [begin, end) of the tile. The others stand for any key: nobody sees them.
void locate(const AttentionArgs& args, const Task& task, int64_t tile, int64_t begin, int64_t end, TileRows& at) {
  const int64_t stride = args.kv_heads * args.head_dim, head = task.kv_head * args.head_dim;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t slot = task.context.slot(tile * kTile + j);
    at.keys[j] = (slot >= 0 ? args.k_cache + slot * stride : args.k + (-slot - 1) * args.k_stride) + head;
    at.values[j] = (slot >= 0 ? args.v_cache + slot * stride : args.v + (-slot - 1) * args.v_stride) + head;
  }
  for (int64_t j = 0; j < kTile; ++j)
    if (j < begin || j >= end) {
      at.keys[j] = at.keys[begin];
      at.values[j] = at.values[begin];
    }
}

void fetch(const float* row, int64_t floats) {
  for (int64_t d = 0; d < floats; d += 16) __builtin_prefetch(row + d, 0, 2);
}

// Copies keys [begin, end) of the tile transposed into whole vectors and, unless read in place, values as rows: those
// of the head that begins `offset` floats after the task's first.
void gather_tile(const TileRows& at, const TileRows* next, int64_t offset, int64_t begin, int64_t end, Work& work) {
  for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
    if (next)
      for (int i = 0; i < kLanes; ++i) fetch(next->keys[j + i] + offset, work.dim);
    transpose_rows(at.keys + j, offset, work.dim, work.keys + j, kTile);
  }
  if (work.in_place()) return;
  for (int64_t j = begin; j < end; ++j) {
    const float* value = at.values[j] + offset;
    float* to = work.values + j * work.width;
    int64_t d = 0;
    for (; d + kLanes <= work.dim; d += kLanes) store(to + d, load(value + d));
    for (; d < work.dim; ++d) to[d] = value[d];
  }
}

// What one row, or any of some rows, sees of a tile: keys [low, high).
struct Seen {
  int64_t low, high;
};

// Scores -> weights e^(score - largest) in place, 0 for a key that the row does not see (its score may hold anything).
// Updates each row's maximum, sum and unfinished result. Beyond `any` nothing is read or written.
void softmax_rows(int64_t row, int rows, const Seen* seen, Seen any, Work& work) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int begin = static_cast<int>(any.low / kLanes * kLanes), end = static_cast<int>(round_up(any.high, kLanes));
  for (int r = 0; r < rows; ++r) {
    float* scores = work.scores + r * kTile;
    if (seen[r].low > begin || seen[r].high < end) {
      const int32_t low = static_cast<int32_t>(seen[r].low), high = static_cast<int32_t>(seen[r].high);
      for (int j = begin; j < end; j += kLanes) {
        const vi key = lane + j;
        store(scores + j, ((key >= low) & (key < high)) ? load(scores + j) : splat(kMinusInfinity));
      }
    }
    const float before = work.split.largest[row + r];
    vf most = splat(before);
    for (int j = begin; j < end; j += kLanes) most = larger(load(scores + j), most);
    most = largest_lane(most);
    work.split.largest[row + r] = most[0];
    const vf base = most == kMinusInfinity ? vf{} : most;  // no key seen yet: -inf - 0, not -inf + inf
    float* total = work.split.total + (row + r) * kLanes;
    vf sum = {};
    for (int j = begin; j < end; j += kLanes) {
      const vf weight = exp_nonpositive(load(scores + j) - base);
      store(scores + j, weight);
      sum += weight;
    }
    if (before == most[0]) {  // the factor would be 1
      store(total, load(total) + sum);
      continue;
    }
    const vf factor = exp_nonpositive(before - base);
    store(total, load(total) * factor + sum);
    float* out = work.split.out + (row + r) * work.width;
    for (int64_t d = 0; d < work.width; d += kLanes) store(out + d, load(out + d) * factor);
  }
}

// Rows [row, row + rows) of the task, of one key-value head, at most kRows, against the gathered tile. `next`: what to
// fetch for the next tile, or null.
void attend_rows(const AttentionArgs& args, const Task& task, int64_t tile, int64_t row, int rows, int64_t offset,
                 const TileRows& at, const TileRows* next, Work& work) {
  const int64_t group = args.heads / args.kv_heads;
  Seen seen[kRows];
  int64_t position = task.first + row % work.head_rows / group - tile * kTile, head = row % group;
  for (int r = 0; r < rows; ++r) {
    seen[r] = {args.window ? max64(position - args.window + 1, 0) : 0, min64(position + 1, kTile)};
    if (++head == group) {
      head = 0;
      ++position;
    }
  }
  const Seen any = {seen[0].low, seen[rows - 1].high};
  if (any.low >= any.high) return;
  const int64_t begin = any.low / kLanes * kLanes, vectors = (round_up(any.high, kLanes) - begin) / kLanes;
  float* scores = work.scores + begin;
  const float* q = work.q + row * work.dim;
  product<false>(rows, q, work.dim, Strided{work.keys + begin, kTile}, scores, kTile, min64(work.dim, kDepth), vectors);
  for (int64_t d = kDepth; d < work.dim; d += kDepth)
    product<true>(rows, q + d, work.dim, Strided{work.keys + d * kTile + begin, kTile}, scores, kTile,
                  min64(work.dim - d, kDepth), vectors);
  softmax_rows(row, rows, seen, any, work);
  const float* weights = work.scores + any.low;
  float* out = work.split.out + row * work.width;
  const int64_t depth = any.high - any.low;
  if (work.in_place()) {
    const Scattered values = {at.values + any.low, next ? next->values + any.low : nullptr, offset};
    product<true>(rows, weights, kTile, values, out, work.width, depth, work.width / kLanes);
  } else {
    const Strided values = {work.values + any.low * work.width, work.width};
    product<true>(rows, weights, kTile, values, out, work.width, depth, work.width / kLanes);
  }
}

// The keys that any query of the task sees: positions [oldest, newest].
int64_t newest(const Task& task) { return task.first + task.positions - 1; }
int64_t oldest(const AttentionArgs& args, const Task& task) {
  return args.window ? max64(task.first - args.window + 1, 0) : 0;
}

// The copy of q that the products read.
void scale_queries(const AttentionArgs& args, const Task& task, Work& work) {
  const int64_t group = args.heads / args.kv_heads * args.head_dim;
  float* to = work.q;
  for (int64_t head = task.kv_head; head < task.kv_head + task.kv_heads; ++head)
    for (int64_t p = 0; p < task.positions; ++p, to += group) {
      const float* from = args.q + (task.row + p) * args.q_stride + head * group;
      for (int64_t i = 0; i < group; ++i) to[i] = from[i] * args.scale;
    }
}

// The rows of the task over the keys of one split, into work.split.
void run_split(const AttentionArgs& args, const Task& task, int64_t split, Work& work) {
  const int64_t begin = max64(oldest(args, task), split * kSplit), end = min64(newest(task) + 1, (split + 1) * kSplit);
  TileRows rows[2];
  const auto find = [&](int64_t tile, TileRows& at) {
    locate(args, task, tile, max64(begin - tile * kTile, 0), min64(end - tile * kTile, kTile), at);
  };
  work.split.clear(work.rows, work.width);
  const int64_t calls = (work.head_rows + kRows - 1) / kRows;
  const int64_t step = (work.head_rows + calls - 1) / calls;  // of 7 rows 4 and 3, not 6 and 1
  const int64_t first = begin / kTile, last = (end - 1) / kTile;
  TileRows *at = &rows[0], *next = &rows[1];
  find(first, *at);
  if (work.in_place())
    for (int64_t j = 0; j < kTile; ++j) {
      fetch(at->keys[j], task.kv_heads * work.dim);
      fetch(at->values[j], task.kv_heads * work.dim);
    }
  for (int64_t tile = first; tile <= last; ++tile) {
    if (tile < last) find(tile + 1, *next);
    const TileRows* ahead = tile < last && work.in_place() ? next : nullptr;
    for (int64_t head = 0; head < task.kv_heads; ++head) {
      const int64_t offset = head * work.dim, past = (head + 1) * work.head_rows;
      gather_tile(*at, ahead, offset, max64(begin - tile * kTile, 0), min64(end - tile * kTile, kTile), work);
      for (int64_t row = head * work.head_rows; row < past; row += step)
        attend_rows(args, task, tile, row, static_cast<int>(min64(step, past - row)), offset, *at, ahead, work);
    }
    TileRows* done = at;
    at = next;
    next = done;
  }
}

// Joins row `row` of the next split to the splits before it.
void join_row(const State& joined, const State& split, int64_t row, int64_t width) {
  const vf a = splat(joined.largest[row]), b = splat(split.largest[row]), most = larger(b, a);
  const vf base = most == kMinusInfinity ? vf{} : most;
  const vf keep = exp_nonpositive(a - base), add = exp_nonpositive(b - base);
  joined.largest[row] = most[0];
  float *total = joined.total + row * kLanes, *out = joined.out + row * width;
  store(total, load(total) * keep + load(split.total + row * kLanes) * add);
  for (int64_t d = 0; d < width; d += kLanes)
    store(out + d, load(out + d) * keep + load(split.out + row * width + d) * add);
}

// Joins the rows that see a key of the split: to the others it is as if it were not there.
__attribute__((noinline)) void join(const AttentionArgs& args, const Task& task, int64_t split, const State& from,
                                    const Work& work) {
  const int64_t group = args.heads / args.kv_heads;
  for (int64_t row = 0; row < work.rows; ++row) {
    const int64_t position = task.first + row % work.head_rows / group;
    if (position >= split * kSplit && (!args.window || position - args.window + 1 < (split + 1) * kSplit))
      join_row(work.joined, from, row, work.width);
  }
}

void finish(const AttentionArgs& args, const Task& task, const Work& work) {
  const int64_t group = args.heads / args.kv_heads, dim = work.dim;
  for (int64_t row = 0; row < work.rows; ++row) {
    const int64_t position = row % work.head_rows / group;
    const int64_t head = (task.kv_head + row / work.head_rows) * group + row % group;
    const float total = reduce_add(load(work.joined.total + row * kLanes));
    const float* from = work.joined.out + row * work.width;
    float* to = args.out + ((task.row + position) * args.heads + head) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = from[d] / total;
  }
}

void run_task(const AttentionArgs& args, const Task& task) {
  Work work(args, task);
  scale_queries(args, task, work);
  work.joined.clear(work.rows, work.width);
  for (int64_t split = oldest(args, task) / kSplit; split <= newest(task) / kSplit; ++split) {
    run_split(args, task, split, work);
    join(args, task, split, work.split, work);
  }
  finish(args, task, work);
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
    run_task(args, {{slots + cu_k[n], 1}, cu_q[n] + p[1], p[2], context - queries + p[1], index % args.kv_heads, 1});
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
  // A row's splits are tasks of their own where there are few rows, and single heads where there still are few tasks.
  const int64_t splits = (blocks * block_size + kSplit - 1) / kSplit, enough = 4 * get_num_threads();
  const int64_t heads = args.rows * splits >= enough ? args.kv_heads : 1, parts = args.kv_heads / heads;
  const auto task = [&](int64_t index) {
    const int64_t b = index / parts;
    return Task{{block_table + b * blocks, block_size}, b, 1, context_lens[b] - 1, index % parts * heads, heads};
  };
  const int64_t tasks = args.rows * parts;
  if (splits == 1 || args.rows >= enough) {
    parallel_for(tasks, [&](int64_t index) { run_task(args, task(index)); });
    return -1;
  }
  const int64_t rows = args.heads / parts, width = round_up(args.head_dim, kLanes);
  const int64_t floats = round_up(State::floats(rows, width), 16);
  static thread_local Scratch scratch;
  float* const states = scratch.floats(static_cast<size_t>(tasks * splits * floats));
  parallel_for(tasks * splits, [&](int64_t index) {
    const Task one = task(index / splits);
    const int64_t split = index % splits;
    if (split < oldest(args, one) / kSplit || split > newest(one) / kSplit) return;
    Work work(args, one);
    scale_queries(args, one, work);
    work.split = State(states + index * floats, rows, width);
    run_split(args, one, split, work);
  });
  for (int64_t index = 0; index < tasks; ++index) {
    const Task one = task(index);
    const Work work(args, one);
    work.joined.clear(rows, width);
    for (int64_t split = oldest(args, one) / kSplit; split <= newest(one) / kSplit; ++split)
      join(args, one, split, State(states + (index * splits + split) * floats, rows, width), work);
    finish(args, one, work);
  }
  return -1;
}

void exp_all(const float* x, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, exp_nonpositive(load(x + i)));
}

}  // namespace

const AttentionOps& attention_ops() {
  static const AttentionOps ops = {tree, paged_decode, exp_all};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
