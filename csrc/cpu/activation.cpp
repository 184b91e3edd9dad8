#include "cpu/activation.h"

#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

struct Silu {
  static vf apply(vf x) { return x / (1.0f + simd::exp(-x)); }
};

struct GeluTanh {
  static vf apply(vf x) {
    // 0.5 x (1 + tanh(u)) == x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
    const vf u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.0f + simd::exp(-2.0f * u));
  }
};

template <typename F>
void gated(const float* gate, const float* up, float* out, int64_t n) {
  constexpr int64_t kChunk = 16384;
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t task) {
    const int64_t begin = task * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, F::apply(load(gate + i)) * load(up + i));
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      store_partial(out + i, F::apply(load_partial(gate + i, rest)) * load_partial(up + i, rest), rest);
    }
  });
}

}  // namespace

const ActivationOps& activation_ops() {
  static const ActivationOps ops = {gated<Silu>, gated<GeluTanh>};
  return ops;
}

}  // namespace UMA_ISA
}  // namespace uma
