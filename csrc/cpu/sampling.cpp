// One token a row. What top_k and top_p keep is the front of the order (logit down, index up): a bisection over the
// distance to the largest logit finds the narrow band in which the cut falls, and only that band is sorted.
#include "cpu/sampling.h"

#include "uma/scratch.h"
#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr float kInfinity = __builtin_inff();
constexpr int kBands = 2048;  // equal bands of the distance, down to where simd::exp gives 0
constexpr float kLowest = -87.3f;
constexpr int64_t kBlock = 256;           // weights summed in fp32 before fp64 takes over; a multiple of kLanes

uint64_t mix(uint64_t x) {  // SplitMix64 (Steele, Lea and Flood 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

double uniform(int64_t seed, int64_t step) {  // [0, 1)
  const uint64_t bits = mix(mix(static_cast<uint64_t>(seed)) + 0x9E3779B97F4A7C15u * (static_cast<uint64_t>(step) + 1));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

struct Candidate {
  float distance;
  int32_t index;

  bool before(const Candidate& other) const {
    return distance > other.distance || (distance == other.distance && index < other.index);
  }
};

void sift_down(Candidate* heap, int64_t at, int64_t count) {
  const Candidate moved = heap[at];
  for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && heap[child].before(heap[child + 1])) ++child;
    if (!moved.before(heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

void sort(Candidate* items, int64_t count) {  // heapsort: no worst case
  for (int64_t i = count / 2 - 1; i >= 0; --i) sift_down(items, i, count);
  for (int64_t end = count - 1; end > 0; --end) {
    const Candidate last = items[0];
    items[0] = items[end];
    items[end] = last;
    sift_down(items, 0, end);
  }
}

// One row: distances to the largest logit, (logit - largest) / temperature <= 0, and weights e^distance; both padded to
// whole blocks. A token that is out has distance -inf and weight 0.
struct Row {
  float* distance;
  float* weight;
  int64_t padded;

  // How many tokens lie above `threshold`, and what they weigh: fp32 within a block, fp64 beyond.
  int64_t count_above(float threshold) const {
    vi count = {};
    for (int64_t i = 0; i < padded; i += kLanes) count -= load(distance + i) > threshold;
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += count[lane];
    return sum;
  }
  double weight_above(float threshold) const {
    double sum = 0.0;
    for (int64_t block = 0; block < padded; block += kBlock) {
      vf part = {};
      for (int64_t i = block; i < block + kBlock; i += kLanes)
        part += load(distance + i) > threshold ? load(weight + i) : vf{};
      sum += static_cast<double>(reduce_add(part));
    }
    return sum;
  }

  // Keeps the fewest tokens whose number reaches `number` or, if `share` is not 0, whose part of the weight reaches it.
  void keep_front(int64_t number, double share) {
    const auto threshold = [](int band) { return kLowest * (static_cast<float>(band) / kBands); };
    const double target = share > 0.0 ? share * weight_above(-kInfinity) : 0.0;
    const auto reached = [&](float limit) {
      return share > 0.0 ? weight_above(limit) >= target : count_above(limit) >= number;
    };
    int low = 0, high = kBands;  // not reached above threshold(low); taken as reached above threshold(high)
    if (share == 0.0 && !reached(threshold(kBands))) return;  // fewer tokens have a weight than may stay
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (reached(threshold(middle)) ? high : low) = middle;
    }
    const float top = low == 0 ? kInfinity : threshold(low), bottom = threshold(high);
    double mass = low > 0 && share > 0.0 ? weight_above(top) : 0.0;
    int64_t count = low > 0 ? count_above(top) : 0;
    const int64_t members = count_above(bottom) - count;
    static thread_local Scratch scratch;
    auto* band = static_cast<Candidate*>(scratch.bytes(static_cast<size_t>(members) * sizeof(Candidate)));
    int64_t found = 0;
    for (int64_t i = 0; i < padded; ++i)
      if (distance[i] > bottom && !(distance[i] > top)) band[found++] = {distance[i], static_cast<int32_t>(i)};
    sort(band, found);
    int64_t last = 0;
    for (; last + 1 < found; ++last) {
      mass += static_cast<double>(weight[band[last].index]);
      ++count;
      if (share > 0.0 ? mass >= target : count >= number) break;
    }
    drop_behind(band[last]);
  }

  void drop_behind(const Candidate& last) {
    vi index;
    for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
    for (int64_t i = 0; i < padded; i += kLanes, index += kLanes) {
      const vf d = load(distance + i);
      const vi behind = (d < last.distance) | ((d == last.distance) & (index > last.index));
      store(distance + i, behind ? splat(-kInfinity) : d);
      store(weight + i, behind ? vf{} : load(weight + i));
    }
  }

  void drop_lighter(float least) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vf w = load(weight + i);
      store(weight + i, w < least ? vf{} : w);
    }
  }
};

// The first token, in index order, at which the cumulative weight exceeds u times the whole.
int64_t draw(const float* weight, int64_t padded, double u) {
  static thread_local Scratch scratch;
  double* sums = static_cast<double*>(scratch.bytes(static_cast<size_t>(padded / kBlock) * sizeof(double)));
  double whole = 0.0;
  for (int64_t block = 0; block < padded / kBlock; ++block) {
    vf sum = {};
    for (int64_t i = 0; i < kBlock; i += kLanes) sum += load(weight + block * kBlock + i);
    sums[block] = static_cast<double>(reduce_add(sum));
    whole += sums[block];
  }
  const double target = u * whole;
  double cumulative = 0.0;
  int64_t last = 0;  // the last token with a weight: where rounding leaves the sum below the target
  for (int64_t block = 0; block < padded / kBlock; ++block) {
    if (sums[block] == 0.0) continue;
    const bool here = cumulative + sums[block] > target;
    if (!here) {
      cumulative += sums[block];
      last = block * kBlock + kBlock - 1;
      continue;
    }
    double within = cumulative;
    for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
      if (weight[i] == 0.0f) continue;
      within += static_cast<double>(weight[i]);
      last = i;
      if (within > target) return i;
    }
    return last;
  }
  while (weight[last] == 0.0f) --last;
  return last;
}

// Logits -> scores: masked, with penalties; padded with -inf. A failure code, or 0.
int64_t prepare(const SamplingArgs& args, int64_t row, float* scores, int64_t padded) {
  const float* logits = args.logits + row * args.vocab;
  const uint8_t* mask = args.mask ? args.mask + row * args.vocab : nullptr;
  int bad = 0;
  for (int64_t i = 0; i < args.vocab; ++i) {
    bad |= !(logits[i] < kInfinity);
    scores[i] = logits[i];
  }
  if (bad) return kNotFinite;
  for (int64_t i = args.vocab; i < padded; ++i) scores[i] = -kInfinity;
  if (mask)
    for (int64_t i = 0; i < args.vocab; ++i) scores[i] = mask[i] ? scores[i] : -kInfinity;
  if (!args.seen) return 0;
  const int64_t* ids = reinterpret_cast<const int64_t*>(args.seen[3 * row]);
  const int32_t* counts = reinterpret_cast<const int32_t*>(args.seen[3 * row + 1]);
  const float repetition = args.repetition_penalty[row];
  for (int64_t i = 0; i < args.seen[3 * row + 2]; ++i) {
    if (ids[i] < 0 || ids[i] >= args.vocab) return kBadId;
    float score = scores[ids[i]];
    score = score > 0.0f ? score / repetition : score * repetition;
    if (counts[i] > 0)
      score -= args.frequency_penalty[row] * static_cast<float>(counts[i]) + args.presence_penalty[row];
    scores[ids[i]] = score;
  }
  return 0;
}

int64_t sample_row(const SamplingArgs& args, int64_t row) {
  const int64_t vocab = args.vocab, padded = (vocab + kBlock - 1) / kBlock * kBlock;
  static thread_local Scratch score_scratch, weight_scratch;
  float* scores = score_scratch.floats(static_cast<size_t>(padded));
  if (const int64_t failure = prepare(args, row, scores, padded)) return failure;
  vf most = splat(-kInfinity);
  for (int64_t i = 0; i < padded; i += kLanes) most = max(most, load(scores + i));
  const float largest = reduce_max(most);
  if (largest == -kInfinity) return kNoToken;
  const float temperature = args.temperature[row];
  if (temperature == 0.0f) {
    int64_t i = 0;
    while (scores[i] != largest) ++i;
    return i;
  }

  float* weight = weight_scratch.floats(static_cast<size_t>(padded));
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vf distance = (load(scores + i) - largest) / temperature;
    store(scores + i, distance);
    store(weight + i, simd::exp(distance));
  }
  Row candidates = {scores, weight, padded};
  if (args.top_k[row] > 0 && args.top_k[row] < vocab) candidates.keep_front(args.top_k[row], 0.0);
  if (args.top_p[row] < 1.0f) candidates.keep_front(0, static_cast<double>(args.top_p[row]));
  if (args.min_p[row] > 0.0f) candidates.drop_lighter(args.min_p[row]);
  return draw(weight, padded, uniform(args.seeds[row], args.steps[row]));
}

void sample(const SamplingArgs& args) {
  parallel_for(args.rows, [&](int64_t row) { args.out[row] = sample_row(args, row); });
}

}  // namespace

const SamplingOps& sampling_ops() {
  static const SamplingOps ops = {sample};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
