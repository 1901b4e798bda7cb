// Compiled by compiler.cmake, never linked: C++20's library and language, and the vectors of
// simd.h.

#include <array>
#include <bit>
#include <concepts>
#include <cstdint>

#include "../cpp/simd.h"

namespace c3a::cpu::C3A_LEVEL {

void try_transpose(Vec<float> (&r)[kLanes<float>]) { transpose<float>(r); }

uint64_t try_cpp20(double value) {
  struct Pair {
    uint64_t a, b;
    bool operator==(const Pair&) const = default;
  };
  const auto bits = []<class T>(T x)
    requires std::floating_point<T>
  { return std::bit_cast<uint64_t>(x); };
  return std::rotl(bits(value), Pair{1, 2} == Pair{.a = 1, .b = 2} ? 1 : 2);
}

}  // namespace c3a::cpu::C3A_LEVEL
