#include "cpu/lora.h"

#include <pybind11/stl.h>

#include <vector>

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_lora(pybind11::module_& m) {
  pybind11::enum_<FactorType>(m, "FactorType")
      .value("fp32", FactorType::fp32)
      .value("fp16", FactorType::fp16)
      .value("bf16", FactorType::bf16);
  m.def("lora_packed_bytes", [](int64_t rank, int64_t k, int64_t n, FactorType type) {
    return UMA_SELECT(lora_ops)().packed_bytes(rank, k, n, type);
  });
  m.def(
      "pack_lora",
      [](uintptr_t to, int64_t rank, int64_t k, int64_t n, FactorType type, float scaling, uintptr_t a, uintptr_t b) {
        return UMA_SELECT(lora_ops)().pack(at<uint8_t>(to), {rank, k, n, scaling, type}, at<const void>(a), at<const void>(b));
      },
      NoGil());
  // `adapters` holds the addresses of the first slice's adapters, 0 for none, then the next one's; slice s has widths[s] columns.
  // Returns the first place in `adapters` of one that was packed for another K or N (nothing is done), else -1.
  m.def("lora", [](uintptr_t x, int64_t k, uintptr_t out, int64_t out_stride, const std::vector<uintptr_t>& adapters,
                   const std::vector<int64_t>& widths, uintptr_t offsets, uintptr_t order) -> int64_t {
    std::vector<const uint8_t*> addresses(adapters.size());
    const size_t count = adapters.size() / widths.size();
    for (size_t i = 0; i < addresses.size(); ++i) {
      addresses[i] = at<const uint8_t>(adapters[i]);
      const LoraHeader* header = at<const LoraHeader>(adapters[i]);
      if (header != nullptr && (header->k != k || header->n != widths[i / count])) return static_cast<int64_t>(i);
    }
    pybind11::gil_scoped_release release;
    taped([=] {
      std::vector<LoraSlice> slices(widths.size());
      int64_t column = 0;
      for (size_t s = 0; s < slices.size(); column += widths[s++]) slices[s] = {addresses.data() + s * count, column};
      UMA_SELECT(lora_ops)().lora(at<const float>(x), at<float>(out), out_stride, slices.data(),
                                  static_cast<int64_t>(slices.size()), at<const int32_t>(offsets),
                                  static_cast<int64_t>(count), at<const int32_t>(order));
    });
    return -1;
  });
}

}  // namespace uma
