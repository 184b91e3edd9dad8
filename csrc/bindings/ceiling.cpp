#include "cpu/ceiling.h"

#include <chrono>
#include <cstring>

#include "bindings/bindings.h"
#include "uma/thread_pool.h"

namespace uma {
namespace {

// Rate of one kind of work with `threads` threads, in operations or bytes per second: the best of several goes of about
// `seconds` each. `memory` holds threads * floats floats for reading, twice that for copying, on a 64-byte boundary.
double ceiling(const char* kind, int threads, double seconds, uintptr_t memory, int64_t floats) {
  using Clock = std::chrono::steady_clock;
  const CeilingOps& ops = UMA_SELECT(ceiling_ops)();
  const int before = get_num_threads();
  set_num_threads(threads);
  float* base = at<float>(memory);
  int64_t rounds = 1 << 14;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    double done[256] = {};
    const auto began = Clock::now();
    parallel_for(threads, [&](int64_t task) {
      float sink = 0;
      double& mine = done[task];
      if (!std::strcmp(kind, "fp32_fma")) mine = ops.fp32_fma(rounds, &sink);
      if (!std::strcmp(kind, "int16_madd")) mine = ops.int16_madd(rounds, &sink);
      if (!std::strcmp(kind, "int8_madd")) mine = ops.int8_madd(rounds, &sink);
      if (!std::strcmp(kind, "int4_madd")) mine = ops.int4_madd(rounds, &sink);
      if (!std::strcmp(kind, "int16_vnni")) mine = ops.int16_vnni(rounds, &sink);
      if (!std::strcmp(kind, "int8_vnni")) mine = ops.int8_vnni(rounds, &sink);
      if (!std::strcmp(kind, "read")) mine = ops.read(base + task * floats, floats, &sink);
      if (!std::strcmp(kind, "copy")) mine = ops.copy(base + task * floats, base + (threads + task) * floats, floats);
      volatile float kept = sink;
      (void)kept;
    });
    const double took = std::chrono::duration<double>(Clock::now() - began).count();
    double total = 0;
    for (double d : done) total += d;
    if (total == 0) break;
    if (took > 2e-3 && total / took > best) best = total / took;
    if (took < 5e-3) rounds *= 2;
  } while (Clock::now() < end);
  set_num_threads(before);
  return best;
}

}  // namespace

void bind_ceiling(pybind11::module_& m) { m.def("ceiling", &ceiling, NoGil()); }

}  // namespace uma
