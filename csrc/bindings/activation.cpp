#include "cpu/activation.h"

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_activation(pybind11::module_& m) {
  m.def(
      "swiglu",
      [](uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width) {
        return taped([=] {
          UMA_SELECT(activation_ops)().swiglu(at<const float>(gate_up), at<float>(out), rows, width);
        });
      },
      NoGil());
  m.def(
      "geglu_tanh",
      [](uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width) {
        return taped([=] {
          UMA_SELECT(activation_ops)().geglu_tanh(at<const float>(gate_up), at<float>(out), rows, width);
        });
      },
      NoGil());
}

}  // namespace uma
