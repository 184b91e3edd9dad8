// The k best rows of a corpus for each query by inner product, and late interaction over token embeddings.
#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

enum class CorpusFormat : int { fp32 = 0, fp16 = 1, int8 = 2 };

// Rows of `stride` elements, whose bytes are a multiple of 64; what lies beyond the width is zero. Every value is finite.
struct CorpusView {
  const uint8_t* data;
  const float* scales;  // one a row (int8), else null
  int64_t count, stride;
  CorpusFormat format;
};

struct TopkOps {
  // scores, indices [num_queries, k]: by score down, then index up; where there are fewer than k rows, the tail is -inf and -1.
  // queries [num_queries, query_stride], zero from the corpus' width on, query_stride >= corpus.stride. Bit i % 32 of
  // filter[i / 32] says whether row i takes part; null: all do. corpus.count is below 2^32.
  void (*topk)(const CorpusView& corpus, const float* queries, int64_t num_queries, int64_t query_stride, int64_t k,
               const uint32_t* filter, float* scores, int64_t* indices);
  // The same for the rows `survivors` [num_queries, count] alone, -1 for none.
  void (*rescore)(const CorpusView& corpus, const float* queries, int64_t num_queries, int64_t query_stride, int64_t k,
                  const int64_t* survivors, int64_t count, float* scores, int64_t* indices);
  // out[q, d] = sum over the tokens of query q of the largest product with a token of document d. Tokens are rows of `width`
  // floats; those of query q are query_ends[q] .. query_ends[q + 1] - 1, and likewise for documents.
  void (*maxsim)(const float* queries, const int64_t* query_ends, int64_t num_queries, const float* docs, const int64_t* doc_ends,
                 int64_t num_docs, int64_t width, float* out);
};

UMA_DECLARE_PER_ISA(const TopkOps& topk_ops();)
UMA_DECLARE_PER_ISA(void maxsim(const float* queries, const int64_t* query_ends, int64_t num_queries, const float* docs,
                                const int64_t* doc_ends, int64_t num_docs, int64_t width, float* out);)

}  // namespace uma
