#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of uma_kernels; called through uma_kernels.<op>.cpp, never directly";
  uma::bind_runtime(m);
  uma::bind_activation(m);
  uma::bind_attention(m);
  uma::bind_ceiling(m);
  uma::bind_kv_cache(m);
  uma::bind_label_head(m);
  uma::bind_linear(m);
  uma::bind_lora(m);
  uma::bind_norm(m);
  uma::bind_rope(m);
  uma::bind_sampling(m);
  uma::bind_tape(m);
  uma::bind_topk(m);
}
