#include "cpu/linear.h"

#include "bindings/bindings.h"
#include "bindings/linear.h"
#include "bindings/tape.h"
#include "cpu/linear_fast.h"
#include "cpu/linear_near.h"

namespace uma {

void bind_linear(pybind11::module_& m) {
  m.def("packed_bytes", [](int64_t n, int64_t k, int bits, int block_size, bool has_mins) {
    const PackedWeight w = packed_weight(0, n, k, bits, block_size, has_mins);
    return w.panels() * w.panel_bytes();
  });
  m.def(
      "pack_dense",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t weight) {
        UMA_SELECT(packed_weight_ops)().pack_dense(packed_weight(data, n, k, bits, block_size, has_mins), at<const float>(weight));
      },
      NoGil());
  m.def(
      "pack_quantized",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t quants, uintptr_t scales,
         uintptr_t mins) {
        UMA_SELECT(packed_weight_ops)()
            .pack_quantized(packed_weight(data, n, k, bits, block_size, has_mins), at<const uint8_t>(quants),
                            at<const float>(scales), at<const float>(mins));
      },
      NoGil());
  m.def(
      "linear",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t x, int64_t rows,
         uintptr_t bias, uintptr_t out, int64_t out_stride) {
        return taped([=] {
          UMA_SELECT(linear_ops)().linear(at<const float>(x), rows, packed_weight(data, n, k, bits, block_size, has_mins),
                                          at<const float>(bias), at<float>(out), out_stride);
        });
      },
      NoGil());
  m.def(
      "linear_near",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t x, int64_t rows,
         uintptr_t bias, uintptr_t out, int64_t out_stride) {
        return taped([=] {
          UMA_SELECT(near_linear_ops)().linear(at<const float>(x), rows, packed_weight(data, n, k, bits, block_size, has_mins),
                                               at<const float>(bias), at<float>(out), out_stride, vnni_enabled());
        });
      },
      NoGil());
  m.def(
      "linear_fast",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t x, int64_t rows,
         uintptr_t bias, uintptr_t out, int64_t out_stride) {
        return taped([=] {
          UMA_SELECT(fast_linear_ops)().linear(at<const float>(x), rows, packed_weight(data, n, k, bits, block_size, has_mins),
                                               at<const float>(bias), at<float>(out), out_stride, vnni_enabled());
        });
      },
      NoGil());
  m.def(
      "gather_rows",
      [](uintptr_t data, int64_t n, int64_t k, int bits, int block_size, bool has_mins, uintptr_t ids, int64_t count,
         float scale, uintptr_t out) {
        return taped([=] {
          const int64_t bad =
              UMA_SELECT(packed_weight_ops)()
                  .gather_rows(packed_weight(data, n, k, bits, block_size, has_mins), at<const int64_t>(ids), count, at<float>(out));
          if (bad < 0 && scale != 1.0f)
            for (int64_t i = 0; i < count * k; ++i) at<float>(out)[i] *= scale;
          return bad;
        });
      },
      NoGil());
}

}  // namespace uma
