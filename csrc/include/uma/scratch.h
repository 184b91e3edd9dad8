// Memory that a thread keeps between calls and grows when a call needs more: `static thread_local Scratch name;`.
// Knows sizes; does not know what is kept in it. Contents are undefined after `floats` or `bytes`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifndef UMA_ISA
#error "csrc/cpu sources are compiled with -DUMA_ISA=<name>"
#endif

namespace uma {
namespace UMA_ISA {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `count` bytes on a 64-byte boundary, valid until the next call on this object.
  void* bytes(size_t count) {
    if (count > size_ || memory_ == nullptr) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      const size_t rounded = (count + 4096) & ~size_t{4095};
      if (posix_memalign(&memory_, 64, rounded) != 0) {
        memory_ = nullptr;
        throw std::bad_alloc();
      }
      size_ = rounded;
    }
    return memory_;
  }

  float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace UMA_ISA
}  // namespace uma
