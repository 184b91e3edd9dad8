#include "bindings/bindings.h"

namespace uma {

void bind_sampling(pybind11::module_&) {}

}  // namespace uma
