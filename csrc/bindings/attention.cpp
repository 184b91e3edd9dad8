#include "bindings/bindings.h"

namespace uma {

void bind_attention(pybind11::module_&) {}

}  // namespace uma
