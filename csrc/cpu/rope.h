#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct RopeOps {
  // Rotates, in place, the halves of each head of q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] by row
  // positions[t] of table [table_rows, head_dim] (cos | sin). Rows of q and k begin `q_stride` and `k_stride` floats
  // apart. Returns the first t whose position is outside the table, nothing rotated, or -1.
  int64_t (*rope)(float* q, int64_t q_stride, float* k, int64_t k_stride, const int64_t* positions, const float* table,
                  int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t table_rows);
};

UMA_DECLARE_PER_ISA(const RopeOps& rope_ops();)

}  // namespace uma
