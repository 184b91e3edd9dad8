#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct KvCacheOps {
  // k_cache[slots[t]] = k[t], likewise v, in rows of `width` floats; -1 is skipped. Rows of k and v begin `k_stride` and
  // `v_stride` floats apart. Returns the first t whose slot is outside -1 .. num_slots - 1, nothing written, or -1.
  int64_t (*write)(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* k_cache, float* v_cache,
                   const int32_t* slots, int64_t tokens, int64_t num_slots, int64_t width);
  // out[m] = cache[slots[m]]. Returns the first m whose slot is outside 0 .. num_slots - 1, nothing read, or -1.
  int64_t (*gather)(const float* cache, const int32_t* slots, float* out, int64_t count, int64_t num_slots,
                    int64_t width);
};

UMA_DECLARE_PER_ISA(const KvCacheOps& kv_cache_ops();)

}  // namespace uma
