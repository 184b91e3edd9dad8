// Logits of a few tokens at a few rows.
#pragma once
#include "cpu/linear.h"

namespace uma {

struct LabelHeadOps {
  // out[i, j] = hidden[rows[i], :] . w[ids[j], :], each product summed in one fixed order. hidden has `hidden_rows` rows.
  // Returns false, with nothing written, if an id is no row of w or a row no row of hidden.
  bool (*label_head)(const float* hidden, int64_t hidden_rows, const int64_t* rows, int64_t count, const PackedWeight& w,
                     const int64_t* ids, int64_t labels, float* out);
};

UMA_DECLARE_PER_ISA(const LabelHeadOps& label_head_ops();)

}  // namespace uma
