#include "cpu/kv_cache.h"

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_kv_cache(pybind11::module_& m) {
  m.def(
      "kv_cache_write",
      [](uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t slots, int64_t tokens, int64_t num_slots, int64_t width) {
        return taped([=] {
          return UMA_SELECT(kv_cache_ops)().write(at<const float>(k), k_stride, at<const float>(v), v_stride,
                                                  at<float>(k_cache), at<float>(v_cache), at<const int32_t>(slots), tokens,
                                                  num_slots, width);
        });
      },
      NoGil());
  m.def(
      "kv_cache_gather",
      [](uintptr_t cache, uintptr_t slots, uintptr_t out, int64_t count, int64_t num_slots, int64_t width) {
        return UMA_SELECT(kv_cache_ops)().gather(at<const float>(cache), at<const int32_t>(slots), at<float>(out),
                                                 count, num_slots, width);
      },
      NoGil());
}

}  // namespace uma
