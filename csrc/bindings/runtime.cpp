#include "bindings/bindings.h"
#include "uma/isa.h"
#include "uma/thread_pool.h"

namespace uma {

void bind_runtime(pybind11::module_& m) {
  m.def("isa", [] { return isa_name(active_isa()); });
  m.def("set_isa", [](const char* name) { return set_isa(name); });
  m.def("available_isas", [] {
    pybind11::list names;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
      if (isa_available(isa)) names.append(isa_name(isa));
    return names;
  });
  m.def("vnni_available", &vnni_available);
  m.def("vnni_enabled", &vnni_enabled);
  m.def("set_vnni", &set_vnni);
  m.def("hardware_threads", &hardware_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("get_num_threads", &get_num_threads);
}

}  // namespace uma
