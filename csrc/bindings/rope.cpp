#include "cpu/rope.h"

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_rope(pybind11::module_& m) {
  m.def(
      "rope",
      [](uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride, uintptr_t positions, uintptr_t table,
         int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t table_rows) {
        return taped([=] {
          return UMA_SELECT(rope_ops)().rope(at<float>(q), q_stride, at<float>(k), k_stride, at<const int64_t>(positions),
                                             at<const float>(table), tokens, heads, kv_heads, head_dim, table_rows);
        });
      },
      NoGil());
}

}  // namespace uma
