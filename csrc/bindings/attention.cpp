#include "cpu/attention.h"

#include "bindings/bindings.h"
#include "bindings/tape.h"

namespace uma {

void bind_attention(pybind11::module_& m) {
  m.def(
      "tree_attention",
      [](uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t k_cache,
         uintptr_t v_cache, uintptr_t out, uintptr_t cu_q, uintptr_t cu_k, uintptr_t slots, int64_t chunks, int64_t rows,
         int64_t num_slots, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window) {
        const AttentionArgs args = {at<const float>(q),       at<const float>(k),       at<const float>(v),
                                    at<const float>(k_cache), at<const float>(v_cache), at<float>(out),
                                    q_stride, k_stride, v_stride,
                                    rows, num_slots, heads, kv_heads, head_dim, scale, window};
        return UMA_SELECT(attention_ops)().tree(args, at<const int32_t>(cu_q), at<const int32_t>(cu_k),
                                                at<const int32_t>(slots), chunks);
      },
      NoGil());
  m.def(
      "attention_exp", [](uintptr_t x, uintptr_t to, int64_t count) {
        UMA_SELECT(attention_ops)().exp(at<const float>(x), at<float>(to), count);
      },
      NoGil());
  m.def(
      "paged_decode",
      [](uintptr_t q, int64_t q_stride, uintptr_t k_cache, uintptr_t v_cache, uintptr_t out, uintptr_t block_table,
         uintptr_t context_lens, int64_t rows, int64_t blocks, int64_t block_size, int64_t num_slots, int64_t heads,
         int64_t kv_heads, int64_t head_dim, float scale, int64_t window) {
        return taped([=] {
          const AttentionArgs args = {at<const float>(q),       nullptr,                  nullptr,
                                      at<const float>(k_cache), at<const float>(v_cache), at<float>(out),
                                      q_stride, 0, 0,
                                      rows, num_slots, heads, kv_heads, head_dim, scale, window};
          return UMA_SELECT(attention_ops)().paged_decode(args, at<const int32_t>(block_table),
                                                          at<const int32_t>(context_lens), blocks, block_size);
        });
      },
      NoGil());
}

}  // namespace uma
