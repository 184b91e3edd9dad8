#include <cstdlib>

#include "bindings/bindings.h"
#include "uma/isa.h"
#include "uma/thread_pool.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace uma {

// Lets the C library keep the memory of tensors that are freed between layers. It would give large ones back to the system
// at once, and each layer would then fault its outputs in page by page: a tenth of a ranking's time. Process-wide, as malloc
// is; up to 256 MiB stay with the process. False: not glibc, or its user has set MALLOC_ variables and knows better.
static bool keep_freed_memory() {
#if defined(__GLIBC__)
  for (const char* name : {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"})
    if (std::getenv(name)) return false;
  constexpr int kMiB = 1 << 20;
  return mallopt(M_MMAP_THRESHOLD, 32 * kMiB) && mallopt(M_TRIM_THRESHOLD, 256 * kMiB) && mallopt(M_TOP_PAD, 16 * kMiB);
#else
  return false;
#endif
}

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
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("hardware_threads", &hardware_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("get_num_threads", &get_num_threads);
}

}  // namespace uma
