// What the binding files share. An address travels as an integer: the Python side owns the tensors, checks shapes,
// dtypes and contiguity, and keeps them alive during the call. Every call releases the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace uma {

template <typename T>
inline T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_runtime(pybind11::module_& m);
void bind_activation(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_ceiling(pybind11::module_& m);
void bind_kv_cache(pybind11::module_& m);
void bind_label_head(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_tape(pybind11::module_& m);
void bind_topk(pybind11::module_& m);

}  // namespace uma
