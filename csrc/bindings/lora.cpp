#include "cpu/lora.h"

#include <vector>

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_lora(pybind11::module_& m) {
  m.def("lora_packed_bytes", [](int64_t rank, int64_t k, int64_t n) { return UMA_SELECT(lora_ops)().packed_bytes(rank, k, n); });
  m.def(
      "pack_lora",
      [](uintptr_t to, int64_t rank, int64_t k, int64_t n, float scaling, uintptr_t a, uintptr_t b) {
        UMA_SELECT(lora_ops)().pack(at<uint8_t>(to), {rank, k, n, scaling}, at<const float>(a), at<const float>(b));
      },
      NoGil());
  // `adapters` is a tuple of addresses, 0 for none.
  m.def("lora", [](uintptr_t x, uintptr_t out, int64_t out_stride, const pybind11::tuple& adapters, uintptr_t offsets, uintptr_t order) {
    std::vector<const uint8_t*> addresses(adapters.size());
    for (size_t i = 0; i < addresses.size(); ++i) addresses[i] = at<const uint8_t>(adapters[i].cast<uintptr_t>());
    pybind11::gil_scoped_release release;
    taped([=] {
      UMA_SELECT(lora_ops)().lora(at<const float>(x), at<float>(out), out_stride, addresses.data(), at<const int32_t>(offsets),
                                  static_cast<int64_t>(addresses.size()), at<const int32_t>(order));
    });
  });
}

}  // namespace uma
