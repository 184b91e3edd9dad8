#include "cpu/norm.h"

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_norm(pybind11::module_& m) {
  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t out, int64_t out_stride, int64_t rows, int64_t heads,
         int64_t width, float eps) {
        return taped([=] {
          UMA_SELECT(norm_ops)().rms_norm(at<const float>(x), x_stride, at<const float>(weight), at<float>(out), out_stride,
                                          rows, heads, width, eps);
        });
      },
      NoGil());
  m.def(
      "add_rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, int64_t rows, int64_t width, float eps) {
        return taped([=] {
          UMA_SELECT(norm_ops)().add_rms_norm(at<const float>(x), at<float>(residual), at<const float>(weight),
                                              at<float>(out), rows, width, eps);
        });
      },
      NoGil());
}

}  // namespace uma
