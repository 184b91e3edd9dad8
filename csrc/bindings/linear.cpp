#include "bindings/bindings.h"

namespace uma {

void bind_linear(pybind11::module_&) {}

}  // namespace uma
