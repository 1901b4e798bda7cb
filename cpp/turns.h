// cos and sin of 2 pi k / n, from an angle in the first eighth of the circle, by their series.
//
// Every function is a constant expression without external linkage, so that no instruction set's
// code is mixed with another's and a GPU's tables are made by the compiler.

#pragma once

#include <cstdint>

namespace c3a {

template <class Real>
static constexpr Real series(Real x, bool sine) {
  Real term = sine ? x : 1, sum = term;
  for (int i = sine ? 2 : 1; i < 40; i += 2) sum += term *= -x * x / (i * (i + 1));
  return sum;
}

template <class Real>
static constexpr Real turn(int64_t k, int64_t n, bool sine) {
  constexpr Real kTau = static_cast<Real>(6.283185307179586476925286766559L);
  k %= n;
  if (2 * k > n) return (sine ? -1 : 1) * turn<Real>(n - k, n, sine);
  const bool left = 4 * k > n;  // of the vertical axis, where only the cosine changes its sign
  const Real sign = left && !sine ? -1 : 1;
  const int64_t twice = left ? n - 2 * k : 2 * k;  // the angle is twice / (2 n) of a turn
  if (4 * twice > n) return sign * series<Real>(kTau * (n - 2 * twice) / (4 * n), !sine);
  return sign * series<Real>(kTau * twice / (2 * n), sine);
}

}  // namespace c3a
