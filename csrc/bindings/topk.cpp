#include "cpu/topk.h"

#include "bindings/bindings.h"

namespace uma {
namespace {

CorpusView corpus_view(uintptr_t data, uintptr_t scales, int64_t count, int64_t stride, int format) {
  return {at<const uint8_t>(data), at<const float>(scales), count, stride, static_cast<CorpusFormat>(format)};
}

}  // namespace

void bind_topk(pybind11::module_& m) {
  m.def(
      "topk",
      [](uintptr_t data, uintptr_t scales, int64_t count, int64_t stride, int format, uintptr_t queries, int64_t num_queries,
         int64_t query_stride, int64_t k, uintptr_t filter, uintptr_t out_scores, uintptr_t out_indices) {
        UMA_SELECT(topk_ops)().topk(corpus_view(data, scales, count, stride, format), at<const float>(queries), num_queries,
                                    query_stride, k, at<const uint32_t>(filter), at<float>(out_scores), at<int64_t>(out_indices));
      },
      NoGil());
  m.def(
      "topk_rescore",
      [](uintptr_t data, uintptr_t scales, int64_t count, int64_t stride, int format, uintptr_t queries, int64_t num_queries,
         int64_t query_stride, int64_t k, uintptr_t survivors, int64_t num_survivors, uintptr_t out_scores, uintptr_t out_indices) {
        UMA_SELECT(topk_ops)().rescore(corpus_view(data, scales, count, stride, format), at<const float>(queries), num_queries,
                                       query_stride, k, at<const int64_t>(survivors), num_survivors, at<float>(out_scores),
                                       at<int64_t>(out_indices));
      },
      NoGil());
  m.def(
      "maxsim",
      [](uintptr_t queries, uintptr_t query_ends, int64_t num_queries, uintptr_t docs, uintptr_t doc_ends, int64_t num_docs,
         int64_t width, uintptr_t out) {
        UMA_SELECT(topk_ops)().maxsim(at<const float>(queries), at<const int64_t>(query_ends), num_queries, at<const float>(docs),
                                      at<const int64_t>(doc_ends), num_docs, width, at<float>(out));
      },
      NoGil());
}

}  // namespace uma
