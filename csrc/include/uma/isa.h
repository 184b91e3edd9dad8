// Which instruction set this process uses: the best the CPU has, or what UMA_ISA in the environment names.
// Knows names and levels; does not know any kernel.
#pragma once

namespace uma {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

Isa active_isa();               // fixed at first use, unless set_isa is called
bool set_isa(const char* name); // false: unknown, not compiled in, or the CPU lacks it
const char* isa_name(Isa isa);
bool isa_available(Isa isa);

// Instructions beyond the active set that multiply 16-bit pairs and add (AVX-512 VNNI, AVX-VNNI). They change no bit.
bool vnni_available();          // the CPU has the active set's form of them
bool vnni_enabled();            // available, and not switched off
void set_vnni(bool enabled);    // for tests and benches

// Each op declares its table of functions once per namespace; UMA_SELECT picks the active one.
//   namespace uma { UMA_DECLARE_PER_ISA(const ActivationOps& activation_ops();) }
//   ... UMA_SELECT(activation_ops)().swiglu(...)
#if defined(UMA_HAVE_AVX512)
#define UMA_DECLARE_PER_ISA(...)      \
  namespace portable { __VA_ARGS__ }  \
  namespace avx2 { __VA_ARGS__ }      \
  namespace avx512 { __VA_ARGS__ }
#define UMA_SELECT(fn)                                        \
  (uma::active_isa() == uma::Isa::avx512 ? uma::avx512::fn    \
   : uma::active_isa() == uma::Isa::avx2 ? uma::avx2::fn      \
                                         : uma::portable::fn)
#elif defined(UMA_HAVE_AVX2)
#define UMA_DECLARE_PER_ISA(...)      \
  namespace portable { __VA_ARGS__ }  \
  namespace avx2 { __VA_ARGS__ }
#define UMA_SELECT(fn) (uma::active_isa() == uma::Isa::avx2 ? uma::avx2::fn : uma::portable::fn)
#else
#define UMA_DECLARE_PER_ISA(...) namespace portable { __VA_ARGS__ }
#define UMA_SELECT(fn) uma::portable::fn
#endif

}  // namespace uma
