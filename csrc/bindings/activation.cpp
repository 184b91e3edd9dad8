#include "cpu/activation.h"

#include "bindings/bindings.h"

namespace uma {

void bind_activation(pybind11::module_& m) {
  m.def(
      "swiglu",
      [](uintptr_t gate, uintptr_t up, uintptr_t out, int64_t n) {
        UMA_SELECT(activation_ops)().swiglu(at<const float>(gate), at<const float>(up), at<float>(out), n);
      },
      NoGil());
  m.def(
      "geglu_tanh",
      [](uintptr_t gate, uintptr_t up, uintptr_t out, int64_t n) {
        UMA_SELECT(activation_ops)().geglu_tanh(at<const float>(gate), at<const float>(up), at<float>(out), n);
      },
      NoGil());
}

}  // namespace uma
