#include "bindings/bindings.h"

namespace uma {

void bind_lora(pybind11::module_&) {}

}  // namespace uma
