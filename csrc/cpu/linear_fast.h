// The third arithmetic of matrix products, `fast`: x in 8 bits times the weight's quants, in integers, and outliers in fp32.
//
//   of each row of x and each block of K (a block of the weight), in fp32:
//     its outlier is the value at least twice as large in magnitude as every other, if there is one; it counts as 0 below
//     top = max |x|                    scale_x = top / 127             q_x = round_to_even(x * (127 / top))
//     a block with top < 2^-90 counts as zeros; a block with a NaN or an infinity makes the whole row of `out` NaN
//   sum = 0; for each outlier in order:
//     sum += q_w * (outlier * scale_w)
//   for each block in order:
//     sum += float(sum over k of q_x * q_w) * (scale_x * scale_w)
//     sum += min_w * (scale_x * sum over k of q_x + outlier)           where the weight has minima
//   out = sum + bias
//
// The integer sums are exact and so may be taken in any order; the fp32 ones are taken in this order, fused where the
// instruction set fuses. So a row's bits depend neither on its neighbours nor on how the work is divided.
#pragma once
#include "cpu/linear.h"

namespace uma {

struct FastLinearOps {
  // As LinearOps::linear, for a quantised weight; row t of `out` begins at out + t * out_stride. `vnni`: use the CPU's
  // VNNI instructions (vnni_available must be true); changes no bit.
  void (*linear)(const float* x, int64_t rows, const PackedWeight& w, const float* bias, float* out, int64_t out_stride,
                 bool vnni);
};

UMA_DECLARE_PER_ISA(const FastLinearOps& fast_linear_ops();)

}  // namespace uma
