#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

// What both forms of attention share: q and out [rows, heads, head_dim], caches [num_slots, kv_heads, head_dim].
// Rows of q, k and v begin `q_stride`, `k_stride` and `v_stride` floats apart.
struct AttentionArgs {
  const float* q;
  const float* k;  // this step's keys and values [rows, kv_heads, head_dim]; null in paged_decode
  const float* v;
  const float* k_cache;
  const float* v_cache;
  float* out;
  int64_t q_stride, k_stride, v_stride;
  int64_t rows, num_slots, heads, kv_heads, head_dim;
  float scale;
  int64_t window;  // 0: none
};

struct AttentionOps {
  // Chunk n: rows cu_q[n] .. cu_q[n + 1], context slots[cu_k[n] .. cu_k[n + 1]]. Returns the index of the first slot
  // outside -rows .. num_slots - 1, nothing computed, or -1.
  int64_t (*tree)(const AttentionArgs& args, const int32_t* cu_q, const int32_t* cu_k, const int32_t* slots,
                  int64_t chunks);
  // Row b sees positions 0 .. context_lens[b] - 1 of block_table[b, 0 .. blocks). Returns the first row whose length or
  // blocks are out of range, nothing computed, or -1.
  int64_t (*paged_decode)(const AttentionArgs& args, const int32_t* block_table, const int32_t* context_lens,
                          int64_t blocks, int64_t block_size);
  // to[i] = e^x[i] as the weights are computed, for x <= 0 and a whole number of the widest vectors (16): for tests.
  void (*exp)(const float* x, float* to, int64_t count);
};

UMA_DECLARE_PER_ISA(const AttentionOps& attention_ops();)

}  // namespace uma
