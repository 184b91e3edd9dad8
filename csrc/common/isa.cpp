#include "uma/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#ifdef UMA_HAVE_AVX2
#include <cpuid.h>
#endif

namespace uma {
namespace {

std::atomic<int> g_isa{-1};
std::atomic<bool> g_vnni{true};

Isa best() {
  const char* wanted = std::getenv("UMA_ISA");
  if (wanted != nullptr) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa_available(isa)) return isa;
  }
  if (isa_available(Isa::avx512)) return Isa::avx512;
  if (isa_available(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

bool isa_available(Isa isa) {
#ifdef UMA_HAVE_AVX2
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#ifdef UMA_HAVE_AVX512
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && isa_available(Isa::avx2);
#endif
  return isa == Isa::portable;
}

Isa active_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(best());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool set_isa(const char* name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(name, isa_name(isa)) == 0) {
      if (!isa_available(isa)) return false;
      g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

bool vnni_available() {
#ifdef UMA_HAVE_AVX2
  static const bool avx512_vnni = __builtin_cpu_supports("avx512vnni");
  // Not a name every compiler knows: leaf 7, subleaf 1, EAX bit 4.
  static const bool avx_vnni = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }();
  return active_isa() == Isa::avx512 ? avx512_vnni : active_isa() == Isa::avx2 && avx_vnni;
#else
  return false;
#endif
}

bool vnni_enabled() { return g_vnni.load(std::memory_order_relaxed) && vnni_available(); }

void set_vnni(bool enabled) { g_vnni.store(enabled, std::memory_order_relaxed); }

}  // namespace uma
