#include "bindings/bindings.h"

namespace uma {

void bind_kv_cache(pybind11::module_&) {}

}  // namespace uma
