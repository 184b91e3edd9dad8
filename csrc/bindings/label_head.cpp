#include "bindings/bindings.h"

namespace uma {

void bind_label_head(pybind11::module_&) {}

}  // namespace uma
