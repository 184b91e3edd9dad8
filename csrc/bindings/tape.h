// Recorded calls of kernels: a decode step run once from Python, then again and again in one call.
//
// A binding that may be part of such a step runs its kernel through `taped`: while a tape records on the calling thread, the
// call is kept with its addresses, which must stay valid for as long as the tape is played. Knows calls; does not know tensors.
#pragma once
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

namespace uma {

class Tape {
 public:
  // The tape that records on this thread, or null.
  static Tape*& recording() {
    static thread_local Tape* tape = nullptr;
    return tape;
  }

  template <typename Call>
  void add(const Call& call) {
    if constexpr (std::is_void_v<decltype(call())>)
      calls_.emplace_back([call] { return call(), int64_t{-1}; });
    else
      calls_.emplace_back(call);
  }

  // Makes every call in order; stops at the first that refuses its input (a result that is not negative), returns its index or -1.
  int64_t play() const {
    for (size_t i = 0; i < calls_.size(); ++i)
      if (calls_[i]() >= 0) return static_cast<int64_t>(i);
    return -1;
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

 private:
  std::vector<std::function<int64_t()>> calls_;
};

// Makes `call`, which returns nothing or a number that is negative when all went well, and records it. It owns what it captured.
template <typename Call>
auto taped(const Call& call) {
  if (Tape* tape = Tape::recording()) tape->add(call);
  return call();
}

}  // namespace uma
