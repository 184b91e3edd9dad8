#include "cpu/label_head.h"

#include "bindings/bindings.h"
#include "bindings/linear.h"

namespace uma {

void bind_label_head(pybind11::module_& m) {
  m.def(
      "label_head",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t hidden, int64_t hidden_rows,
         uintptr_t rows, int64_t count, uintptr_t ids, int64_t labels, uintptr_t out) {
        return UMA_SELECT(label_head_ops)()
            .label_head(at<const float>(hidden), hidden_rows, at<const int64_t>(rows), count,
                        packed_weight(data, n, k, bits, block_size, has_mins), at<const int64_t>(ids), labels, at<float>(out));
      },
      NoGil());
}

}  // namespace uma
