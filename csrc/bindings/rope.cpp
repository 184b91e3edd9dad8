#include "bindings/bindings.h"

namespace uma {

void bind_rope(pybind11::module_&) {}

}  // namespace uma
