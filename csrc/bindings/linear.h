// A packed weight as it travels from Python: its address and its shape, in this order, before an op's own arguments.
#pragma once
#include "bindings/bindings.h"
#include "cpu/linear.h"

namespace uma {

inline PackedWeight packed_weight(uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins) {
  return {at<uint8_t>(data), n, k, bits, block_size, has_mins};
}

}  // namespace uma
