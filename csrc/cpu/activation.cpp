#include "cpu/activation.h"

#include "uma/simd.h"
#include "uma/thread_pool.h"

namespace uma {
namespace UMA_ISA {
namespace {

using namespace simd;

constexpr int64_t kTaskFloats = 8192;  // below this a second thread costs more than it brings

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
void gated(const float* gate_up, float* out, int64_t rows, int64_t width) {
  if (width == 0) return;
  const int64_t cuts = (width + kTaskFloats - 1) / kTaskFloats;  // of a row
  const int64_t each = cuts > 1 ? 1 : kTaskFloats / width;       // rows of a task
  parallel_for((rows + each - 1) / each * cuts, [&](int64_t task) {
    const int64_t row = task / cuts * each, row_end = row + each < rows ? row + each : rows;
    const int64_t begin = task % cuts * kTaskFloats, end = begin + kTaskFloats < width ? begin + kTaskFloats : width;
    for (int64_t r = row; r < row_end; ++r) {
      const float* gate = gate_up + r * 2 * width;
      const float* up = gate + width;
      float* to = out + r * width;
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) store(to + i, F::apply(load(gate + i)) * load(up + i));
      if (i < end) {
        const int rest = static_cast<int>(end - i);
        store_partial(to + i, F::apply(load_partial(gate + i, rest)) * load_partial(up + i, rest), rest);
      }
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
