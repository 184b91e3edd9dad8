#include "cpu/sampling.h"

#include "bindings/bindings.h"

namespace uma {

namespace {

// The first row that gave no token and why: "nan", "empty" or "id"; -1 and "" when all did.
pybind11::tuple first_failure(const SamplingArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row)
    if (args.out[row] < 0) {
      const int64_t code = args.out[row];
      return pybind11::make_tuple(row, code == kNotFinite ? "nan" : code == kNoToken ? "empty" : "id");
    }
  return pybind11::make_tuple(-1, "");
}

}  // namespace

void bind_sampling(pybind11::module_& m) {
  m.def("sample", [](uintptr_t logits, uintptr_t mask, uintptr_t seen, uintptr_t out, int64_t rows, int64_t vocab,
                     uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
                     uintptr_t repetition_penalty, uintptr_t presence_penalty, uintptr_t frequency_penalty,
                     uintptr_t seeds, uintptr_t steps) {
    const SamplingArgs args = {at<const float>(logits), at<const uint8_t>(mask), at<const int64_t>(seen),
                               at<int64_t>(out), rows, vocab, at<const float>(temperature), at<const int32_t>(top_k),
                               at<const float>(top_p), at<const float>(min_p), at<const float>(repetition_penalty),
                               at<const float>(presence_penalty), at<const float>(frequency_penalty),
                               at<const int64_t>(seeds), at<const int64_t>(steps)};
    {
      pybind11::gil_scoped_release released;
      UMA_SELECT(sampling_ops)().sample(args);
    }
    return first_failure(args);
  });
}

}  // namespace uma
