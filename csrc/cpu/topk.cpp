// Scores of a block of rows, then the few that beat a query's running k-th best: scores never lie in memory as a matrix.
//
// A lane is one thread's share: it takes blocks of rows in ascending order and keeps, for each query, what may still be among
// the k best of the rows it saw. The order (score down, index up) is total, so the merge of the lanes does not depend on who
// saw what.
#include "cpu/topk.h"

#include <algorithm>

#include "cpu/topk_tile.h"
#include "uma/scratch.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

constexpr int64_t kBlock = 128;   // rows scored before selection; a multiple of kLanes and of 32
constexpr int64_t kTurn = 16;     // blocks that a lane takes at once, at most
constexpr int64_t kChunk = 96;    // queries scored with a block: their vectors stay in the second-level cache
constexpr int64_t kGroup = 8;     // rows interleaved at once, to meet the queries of a chunk in the first-level cache
constexpr int64_t kFew = 2;       // queries that are not worth it
constexpr float kInfinity = __builtin_inff();

// A score and an index as one number: a larger one comes first. The type is local so that templates over it are, too.
struct Entry {
  uint64_t key;
  bool operator<(const Entry& other) const { return key > other.key; }
};

Entry entry(float score, int64_t index) {
  score += 0.0f;  // -0 ties with 0
  uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return {static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(index))};
}

float score_of(Entry e) {
  uint32_t bits = static_cast<uint32_t>(e.key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float score;
  __builtin_memcpy(&score, &bits, 4);
  return score;
}

int64_t index_of(Entry e) { return 0xffffffffu - static_cast<uint32_t>(e.key); }

bool any_above(vf scores, vf threshold) {
  const vi above = scores > threshold;
#if defined(UMA_ISA_AVX512)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(above), reinterpret_cast<__m512i>(above)) != 0;
#elif defined(UMA_ISA_AVX2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(above)) != 0;
#else
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// What may be among a query's k best: beyond `capacity` entries all but the k best go, and the k-th becomes the threshold.
// Rows come in ascending order, so that a later one with an equal score never counts.
struct Best {
  Entry* entries;
  int64_t count, k, capacity;
  float threshold;

  static int64_t capacity_for(int64_t k) { return k + (k > 256 ? k : 256); }

  void offer(float score, int64_t index) {
    entries[count++] = entry(score, index);
    if (count == capacity) {
      std::nth_element(entries, entries + (k - 1), entries + count);
      count = k;
      threshold = score_of(entries[k - 1]);
    }
  }

  // scores of `count` rows, readable to the next multiple of kLanes.
  void offer_all(float* scores, const uint32_t* ids, int64_t rows) {
    for (int64_t i = rows; i % kLanes != 0; ++i) scores[i] = -kInfinity;
    for (int64_t i = 0; i < rows; i += kLanes) {
      if (!any_above(load(scores + i), splat(threshold))) continue;
      for (int j = 0; j < kLanes; ++j)
        if (scores[i + j] > threshold) offer(scores[i + j], ids[i + j]);
    }
  }
};

void write_best(Entry* entries, int64_t count, int64_t k, float* scores, int64_t* indices) {
  const int64_t kept = count < k ? count : k;
  if (count > k) std::nth_element(entries, entries + (k - 1), entries + count);
  std::sort(entries, entries + kept);
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = i < kept ? score_of(entries[i]) : -kInfinity;
    indices[i] = i < kept ? index_of(entries[i]) : -1;
  }
}

// Queries as the format multiplies them: fp32, or int16 with a scale each. `panels` holds the same three by three.
struct Queries {
  const uint8_t* data;
  const uint8_t* panels;
  const float* scales;
  int64_t count, stride, bytes;  // stride: elements of a query, bytes: its size

  const uint8_t* at(int64_t q) const { return data + q * bytes; }
  const uint8_t* panel(int64_t q) const { return panels + q * bytes; }  // q: a multiple of kPanel
};

// As many bits as 32-bit sums over a row of bytes allow.
void quantise(const float* query, int64_t stride, int16_t* out, float* scale) {
  const int64_t most = 0x7fffffff / (127 * stride);
  const float limit = static_cast<float>(most < 32767 ? most : 32767);
  float largest = 0.0f;
  for (int64_t i = 0; i < stride; ++i) largest = std::max(largest, __builtin_fabsf(query[i]));
  // A subnormal query would make the inverse infinite.
  const float inverse = largest >= 0x1p-100f ? limit / largest : 0.0f;
  for (int64_t i = 0; i < stride; ++i) {
    const float x = query[i] * inverse;
    out[i] = static_cast<int16_t>(x + (x < 0.0f ? -0.5f : 0.5f));
  }
  *scale = largest / limit;
}

int64_t row_bytes(const CorpusView& corpus) {
  return corpus.stride * (corpus.format == CorpusFormat::fp32 ? 4 : corpus.format == CorpusFormat::fp16 ? 2 : 1);
}

// Rows to score: addresses, ids and scales.
struct RowList {
  static constexpr int64_t kMost = 2 * kBlock;
  const uint8_t* rows[kMost + kQuad + kAhead];
  uint32_t ids[kMost];
  float scales[kMost + kQuad];
  int64_t count;

  void add(const CorpusView& corpus, int64_t bytes, int64_t index) {
    rows[count] = corpus.data + index * bytes;
    ids[count] = static_cast<uint32_t>(index);
    scales[count] = corpus.scales ? corpus.scales[index] : 1.0f;
    ++count;
  }

  // Copies of the last row up to a multiple of four rows, whose number is returned, and then what will be needed next: where
  // it is known not to be, the last row again. Asking for memory beyond the corpus does no harm.
  int64_t pad(int64_t next_bytes) {
    int64_t end = count;
    for (; end % kQuad != 0; ++end) {
      rows[end] = rows[end - 1];
      scales[end] = scales[end - 1];
    }
    for (int64_t i = 0; i < kAhead; ++i) rows[end + i] = rows[end + i - 1] + next_bytes;
    return end;
  }
};

// scores[q * ld + r] of the rows of a list and the queries first .. first + count - 1.
template <class Format>
void score_list(RowList& list, int64_t next_bytes, const Queries& queries, int64_t first, int64_t count, int64_t stride,
                uint8_t* wide, float* scores, int64_t ld) {
  const int64_t rows = list.pad(next_bytes);
  const float* row_scales = queries.scales ? list.scales : nullptr;
  if (queries.count <= kFew) {
    for (int64_t q = first; q < first + count; ++q)
      for (int64_t r = 0; r < rows; r += kQuad)
        direct_tile<Format>(list.rows + r, row_scales ? row_scales + r : nullptr, queries.at(q), queries.scales ? queries.scales[q] : 1.0f,
                            stride,
                            scores + (q - first) * ld + r);
    return;
  }
  const int64_t steps = stride / Format::kStep, quad_bytes = steps * kQuad * static_cast<int64_t>(sizeof(vi));
  const int64_t lines = stride * Format::kBytes / 64, panels = (count + kPanel - 1) / kPanel;
  const int64_t share = (kGroup * lines + panels - 1) / panels;
  for (int64_t r = 0; r < rows; r += kGroup) {
    const int64_t n = std::min(kGroup, rows - r);
    for (int64_t i = 0; i < n; i += kQuad) interleave<Format>(list.rows + r + i, stride, wide + i / kQuad * quad_bytes);
    // The next group's lines, some before each panel, so that they arrive while this one is multiplied.
    int64_t ahead_row = n, ahead_line = 0;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t i = 0; i < share && ahead_row < n + kGroup; ++i) {
        __builtin_prefetch(list.rows[r + ahead_row] + 64 * ahead_line, 0, 2);
        if (++ahead_line == lines) ahead_line = 0, ++ahead_row;
      }
      const int64_t q = p * kPanel;
      for (int64_t i = 0; i < n; i += kQuad)
        wide_tile<typename Format::Wide>(wide + i / kQuad * quad_bytes, row_scales ? row_scales + r + i : nullptr,
                                         queries.panel(first + q), queries.scales ? queries.scales + first + q : nullptr, steps,
                                         count - q,
                                         scores + q * ld + r + i, ld);
    }
  }
}

void score(const CorpusView& corpus, RowList& list, int64_t next_bytes, const Queries& queries, int64_t first, int64_t count,
           uint8_t* wide, float* scores, int64_t ld) {
  const auto of_format = corpus.format == CorpusFormat::fp32   ? score_list<Fp32Rows>
                         : corpus.format == CorpusFormat::fp16 ? score_list<Fp16Rows>
                                                               : score_list<Int8Rows>;
  of_format(list, next_bytes, queries, first, count, corpus.stride, wide, scores, ld);
}

// Memory that a lane writes while it scores.
struct LaneScratch {
  static constexpr int64_t kLd = RowList::kMost;
  static constexpr int64_t kScores = kChunk * kLd * 4;
  static int64_t bytes(int64_t stride) { return kScores + kGroup * stride * 4; }  // a multiple of 64
  float* scores;
  uint8_t* wide;
  explicit LaneScratch(uint8_t* memory) : scores(reinterpret_cast<float*>(memory)), wide(memory + kScores) {}
};

// Memory lasts as long as the queries. stride: elements of the corpus' rows.
Queries prepare(const CorpusView& corpus, const float* fp32, int64_t count, int64_t query_stride, Scratch& memory) {
  const int64_t stride = corpus.stride;
  const bool narrow = corpus.format == CorpusFormat::int8;
  const int64_t bytes = stride * (narrow ? 2 : 4), panels = (count + kPanel - 1) / kPanel;
  uint8_t* data = static_cast<uint8_t*>(memory.bytes((count + panels * kPanel) * (bytes + 4)));
  uint8_t* panel_data = data + count * bytes;
  float* scales = reinterpret_cast<float*>(panel_data + panels * kPanel * bytes);
  for (int64_t q = 0; q < count; ++q) {
    if (narrow) {
      quantise(fp32 + q * query_stride, stride, reinterpret_cast<int16_t*>(data + q * bytes), scales + q);
    } else {
      __builtin_memcpy(data + q * bytes, fp32 + q * query_stride, bytes);
    }
  }
  constexpr int64_t kVector = sizeof(vi);
  if (count > kFew)
    for (int64_t q = 0; q < panels * kPanel; ++q)
      for (int64_t i = 0; i < bytes / kVector; ++i)
        *reinterpret_cast<viu*>(panel_data + q / kPanel * kPanel * bytes + (i * kPanel + q % kPanel) * kVector) =
            q < count ? *reinterpret_cast<const viu*>(data + q * bytes + i * kVector) : vi{};
  return {data, panel_data, narrow ? scales : nullptr, count, stride, bytes};
}

void topk(const CorpusView& corpus, const float* query_data, int64_t num_queries, int64_t query_stride, int64_t k,
          const uint32_t* filter, float* scores, int64_t* indices) {
  if (num_queries == 0 || k == 0) return;
  const int64_t blocks = (corpus.count + kBlock - 1) / kBlock;
  const int64_t lanes = std::max<int64_t>(1, std::min<int64_t>(get_num_threads(), blocks));
  const int64_t turn = std::max<int64_t>(1, std::min(kTurn, blocks / (8 * lanes)));
  Scratch query_memory, lane_memory, entry_memory;
  const Queries queries = prepare(corpus, query_data, num_queries, query_stride, query_memory);
  const int64_t lane_bytes = LaneScratch::bytes(corpus.stride), bytes = row_bytes(corpus);
  uint8_t* lane_at = static_cast<uint8_t*>(lane_memory.bytes(lanes * lane_bytes));
  const int64_t capacity = Best::capacity_for(k);
  // Best[lanes][num_queries], then Entry[num_queries][lanes][capacity]: those of a query lie together.
  Best* best = static_cast<Best*>(entry_memory.bytes(lanes * num_queries * (sizeof(Best) + capacity * sizeof(Entry))));
  Entry* entries = reinterpret_cast<Entry*>(best + lanes * num_queries);
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t q = 0; q < num_queries; ++q)
      best[lane * num_queries + q] = {entries + (q * lanes + lane) * capacity, 0, k, capacity, -kInfinity};
  int64_t next = 0;
  parallel_for(lanes, [&](int64_t lane) {
    const LaneScratch scratch(lane_at + lane * lane_bytes);
    Best* mine = best + lane * num_queries;
    RowList list;
    for (int64_t block = 0, last = 0; block < blocks;) {
      list.count = 0;
      while (list.count < kBlock) {
        if (block == last) {
          block = __atomic_fetch_add(&next, turn, __ATOMIC_RELAXED);
          last = block + turn;
        }
        if (block >= blocks) break;
        const int64_t begin = block++ * kBlock, end = std::min(begin + kBlock, corpus.count);
        if (filter == nullptr) {
          for (int64_t i = begin; i < end; ++i) list.add(corpus, bytes, i);
        } else {
          for (int64_t at = begin; at < end; at += 32) {
            uint32_t word = filter[at / 32];
            if (end - at < 32) word &= (1u << (end - at)) - 1;
            for (; word != 0; word &= word - 1) list.add(corpus, bytes, at + __builtin_ctz(word));
          }
        }
      }
      if (list.count == 0) break;
      for (int64_t q = 0; q < num_queries; q += kChunk) {
        const int64_t count = std::min(kChunk, num_queries - q);
        score(corpus, list, filter ? 0 : bytes, queries, q, count, scratch.wide, scratch.scores, LaneScratch::kLd);
        for (int64_t j = 0; j < count; ++j) mine[q + j].offer_all(scratch.scores + j * LaneScratch::kLd, list.ids, list.count);
      }
    }
  });
  parallel_for(num_queries, [&](int64_t q) {
    Entry* merged = best[q].entries;
    int64_t count = best[q].count;
    for (int64_t lane = 1; lane < lanes; ++lane) {
      const Best& other = best[lane * num_queries + q];
      for (int64_t i = 0; i < other.count; ++i) merged[count++] = other.entries[i];
    }
    write_best(merged, count, k, scores + q * k, indices + q * k);
  });
}

void rescore(const CorpusView& corpus, const float* query_data, int64_t num_queries, int64_t query_stride, int64_t k,
             const int64_t* survivors, int64_t count, float* scores, int64_t* indices) {
  if (num_queries == 0 || k == 0) return;
  Scratch entry_memory;
  const int64_t bytes = row_bytes(corpus);
  Entry* entries = static_cast<Entry*>(entry_memory.bytes(num_queries * count * sizeof(Entry)));
  parallel_for(num_queries, [&](int64_t q) {
    Entry* mine = entries + q * count;
    int64_t kept = 0;
    RowList list;
    float out[RowList::kMost];
    Scratch query_memory;
    const Queries query = prepare(corpus, query_data + q * query_stride, 1, query_stride, query_memory);
    for (int64_t at = 0; at < count; at += kBlock) {
      list.count = 0;
      for (int64_t i = at; i < std::min(at + kBlock, count); ++i)
        if (survivors[q * count + i] >= 0) list.add(corpus, bytes, survivors[q * count + i]);
      if (list.count == 0) continue;
      score(corpus, list, 0, query, 0, 1, nullptr, out, RowList::kMost);
      for (int64_t i = 0; i < list.count; ++i)
        if (out[i] > -kInfinity) mine[kept++] = entry(out[i], list.ids[i]);
    }
    write_best(mine, kept, k, scores + q * k, indices + q * k);
  });
}

}  // namespace

const TopkOps& topk_ops() {
  static const TopkOps ops = {topk, rescore, maxsim};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
