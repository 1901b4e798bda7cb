// Real transforms of kLanes<T> signals at once, one in each lane, in place: z holds b vectors.
//
// Even b: pairs of neighbours are h = b / 2 complex numbers as they lie. Passes of decimation in
// frequency leave bin k at `position[k]`, and `split` separates the bins of the real signal:
//
//   s = Z[k] + conj(Z[h-k])   t = i w^k (Z[k] - conj(Z[h-k]))   2 X[k] = s - t   2 X[h-k] = conj(s
//   + t)
//
// with w = exp(-2 pi i / b). The inverse takes the same steps backwards, so nothing is reordered.
// Odd b: the signal is the real part of h = b complex numbers.

#pragma once

#include "simd.h"
#include "turns.h"

namespace c3a::cpu::C3A_LEVEL {

template <class T, class V = Vec<T>>
struct Complex {
  V re, im;
};

template <class T, class V>
C3A_INLINE Complex<T, V> operator+(const Complex<T, V>& a, const Complex<T, V>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
C3A_INLINE Complex<T> operator-(const Complex<T>& a, const Complex<T>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
C3A_INLINE Complex<T> conj(const Complex<T>& a) {
  return {a.re, -a.im};
}
template <class T>
C3A_INLINE Complex<T> times_minus_i(const Complex<T>& a) {
  return {a.im, -a.re};
}
// a (re + i im), for scalars re and im
template <class T>
C3A_INLINE Complex<T> times(const Complex<T>& a, T re, T im) {
  return {a.re * re - a.im * im, a.im * re + a.re * im};
}

// cos and sin of 2 pi k / R, for the odd lengths below
template <class T, int R>
struct Turns {
  T cosine[R], sine[R];
};
template <class T, int R>
constexpr Turns<T, R> turns = [] {
  Turns<T, R> table{};
  for (int k = 0; k < R; ++k) {
    table.cosine[k] = static_cast<T>(turn<double>(k, R, false));
    table.sine[k] = static_cast<T>(turn<double>(k, R, true));
  }
  return table;
}();

// a[q] <- sum_p a[p] exp(-2 pi i p q / R)
template <class T, int R>
C3A_INLINE void dft(Complex<T> (&a)[R]) {
  if constexpr (R == 2) {
    const Complex<T> d = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = d;
  } else if constexpr (R == 4) {
    const Complex<T> s = a[0] + a[2], d = a[0] - a[2];
    const Complex<T> u = a[1] + a[3], v = times_minus_i(a[1] - a[3]);
    a[0] = s + u;
    a[1] = d + v;
    a[2] = s - u;
    a[3] = d - v;
  } else if constexpr (R == 6) {
    // 2 and 3 have no common factor: a[2 p + 3 s] needs no twiddles, and bin 3 u + 4 q comes out.
    Complex<T> sums[3], differences[3];
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
      sums[p] = a[2 * p] + a[(2 * p + 3) % 6];
      differences[p] = a[2 * p] - a[(2 * p + 3) % 6];
    }
    dft<T, 3>(sums);
    dft<T, 3>(differences);
#pragma GCC unroll 3
    for (int q = 0; q < 3; ++q) {
      a[4 * q % 6] = sums[q];
      a[(3 + 4 * q) % 6] = differences[q];
    }
  } else if constexpr (R == 8) {
    Complex<T> even[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
    const Complex<T> c0 = a[0] - a[4], c1 = a[1] - a[5];
    const Complex<T> c2 = times_minus_i(a[2] - a[6]), c3 = a[3] - a[7];
    dft<T, 4>(even);
    // c1 and c3 times sqrt(1/2), which goes into the last sums
    const Complex<T> e1{c1.re + c1.im, c1.im - c1.re}, e3{c3.im - c3.re, -(c3.re + c3.im)};
    const Complex<T> s = c0 + c2, d = c0 - c2, u = e1 + e3, v = times_minus_i(e1 - e3);
    constexpr T r = static_cast<T>(0.70710678118654752440);
    a[0] = even[0];
    a[1] = {s.re + u.re * r, s.im + u.im * r};
    a[2] = even[1];
    a[3] = {d.re + v.re * r, d.im + v.im * r};
    a[4] = even[2];
    a[5] = {s.re - u.re * r, s.im - u.im * r};
    a[6] = even[3];
    a[7] = {d.re - v.re * r, d.im - v.im * r};
  } else {
    static_assert(R % 2 == 1);
    constexpr int H = R / 2;
    Complex<T> s[H], d[H], total = a[0];
#pragma GCC unroll 8
    for (int p = 1; p <= H; ++p) {
      s[p - 1] = a[p] + a[R - p];
      d[p - 1] = a[p] - a[R - p];
      total = total + s[p - 1];
    }
    const Complex<T> first = a[0];
    a[0] = total;
#pragma GCC unroll 8
    for (int q = 1; q <= H; ++q) {
      Complex<T> even = first, odd{};
#pragma GCC unroll 8
      for (int p = 1; p <= H; ++p) {
        const T c = turns<T, R>.cosine[p * q % R], e = turns<T, R>.sine[p * q % R];
        even = {even.re + s[p - 1].re * c, even.im + s[p - 1].im * c};
        odd = {odd.re + d[p - 1].re * e, odd.im + d[p - 1].im * e};
      }
      const Complex<T> v = times_minus_i(odd);
      a[q] = even + v;
      a[R - q] = even - v;
    }
  }
}

// The inverse is the same with real and imaginary parts exchanged, and twiddles first.
template <class T, int R, bool kInverse, bool kTwiddle>
C3A_INLINE void butterfly(Vec<T>* z, int64_t stride, const T* twiddle) {
  Complex<T> a[R];
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q) {
    a[q] = {z[2 * q * stride + kInverse], z[2 * q * stride + !kInverse]};
    if (kInverse && kTwiddle && q) a[q] = times(a[q], twiddle[2 * q - 2], twiddle[2 * q - 1]);
  }
  dft<T, R>(a);
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q) {
    if (!kInverse && kTwiddle && q) a[q] = times(a[q], twiddle[2 * q - 2], twiddle[2 * q - 1]);
    z[2 * q * stride + kInverse] = a[q].re;
    z[2 * q * stride + !kInverse] = a[q].im;
  }
}

template <class T, int R, bool kInverse>
void pass(Vec<T>* z, int64_t blocks, int64_t m, const T* twiddles) {
  const int64_t next = 2 * R * m;
  for (int64_t i = 0; i < blocks; ++i) butterfly<T, R, kInverse, false>(z + i * next, m, nullptr);
  for (int64_t k = 1; k < m; ++k) {
    const T* twiddle = twiddles + 2 * (R - 1) * k;
    for (int64_t i = 0; i < blocks; ++i) {
      butterfly<T, R, kInverse, true>(z + i * next + 2 * k, m, twiddle);
    }
  }
}

template <class T, bool kInverse>
void pass(int radix, Vec<T>* z, int64_t blocks, int64_t m, const T* twiddles) {
  switch (radix) {
    case 2: return pass<T, 2, kInverse>(z, blocks, m, twiddles);
    case 3: return pass<T, 3, kInverse>(z, blocks, m, twiddles);
    case 4: return pass<T, 4, kInverse>(z, blocks, m, twiddles);
    case 5: return pass<T, 5, kInverse>(z, blocks, m, twiddles);
    case 6: return pass<T, 6, kInverse>(z, blocks, m, twiddles);
    case 7: return pass<T, 7, kInverse>(z, blocks, m, twiddles);
    case 8: return pass<T, 8, kInverse>(z, blocks, m, twiddles);
    case 11: return pass<T, 11, kInverse>(z, blocks, m, twiddles);
    case 13: return pass<T, 13, kInverse>(z, blocks, m, twiddles);
  }
}

// Passes `level` and on of one transform of `length`. What does not fit into the first-level cache
// is halved (or so) by one pass, then its parts are finished one after the other.
template <class T, bool kInverse>
void passes(const Transform<T>& f, Vec<T>* z, int level, int64_t length) {
  constexpr int64_t kFits = 32 * 1024 / (2 * kVectorBytes);
  if (length > kFits && level + 1 < f.passes) {
    const int64_t radix = f.radices[level], m = length / radix;
    if (!kInverse) pass<T, false>(f.radices[level], z, 1, m, f.twiddles[level]);
    for (int64_t q = 0; q < radix; ++q) passes<T, kInverse>(f, z + 2 * q * m, level + 1, m);
    if (kInverse) pass<T, true>(f.radices[level], z, 1, m, f.twiddles[level]);
    return;
  }
  if (kInverse) {
    int64_t m = 1;
    for (int p = f.passes - 1; p >= level; --p) {
      const int64_t radix = f.radices[p];
      pass<T, true>(f.radices[p], z, length / (m * radix), m, f.twiddles[p]);
      m *= radix;
    }
  } else {
    int64_t m = length;
    for (int p = level; p < f.passes; ++p) {
      const int64_t radix = f.radices[p];
      m /= radix;
      pass<T, false>(f.radices[p], z, length / (m * radix), m, f.twiddles[p]);
    }
  }
}

// `put(slot, spectrum)` receives every slot of the forward transform of z.
template <class T, class Put>
C3A_INLINE void forward(const Transform<T>& f, Vec<T>* z, const Put& put) {
  const auto at = [&](int64_t k) {
    const int64_t p = 2 * f.position[k];
    return Complex<T>{z[p], z[p + 1]};
  };
  const int64_t h = f.h;
  if (f.b % 2) {
    for (int64_t u = h; u-- > 0;) z[2 * u + 1] = Vec<T>{}, z[2 * u] = z[u];
    passes<T, false>(f, z, 0, h);
    for (int64_t k = 0; k < f.slots(); ++k) put(k, at(k));
    return;
  }
  passes<T, false>(f, z, 0, h);
  const Complex<T> zero = at(0), sums{zero.re + zero.im, zero.re - zero.im};
  put(0, sums + sums);
  for (int64_t k = 1; 2 * k < h; ++k) {
    const Complex<T> a = at(k), b = at(h - k);
    const Complex<T> s = a + conj(b), t = times(a - conj(b), f.split[2 * k], f.split[2 * k + 1]);
    put(k, s - t);
    put(h - k, conj(s + t));
  }
  if (h % 2 == 0) put(h / 2, conj(at(h / 2) + at(h / 2)));
}

// `get(slot)` gives the spectrum; z receives the signal.
template <class T, class Get>
C3A_INLINE void inverse(const Transform<T>& f, Vec<T>* z, const Get& get) {
  const auto put = [&](int64_t k, const Complex<T>& value) {
    const int64_t p = 2 * f.position[k];
    z[p] = value.re;
    z[p + 1] = value.im;
  };
  const int64_t h = f.h;
  if (f.b % 2) {
    put(0, get(0));
    for (int64_t k = 1; k < f.slots(); ++k) {
      const Complex<T> value = get(k);
      put(k, value);
      put(h - k, conj(value));
    }
    passes<T, true>(f, z, 0, h);
    for (int64_t u = 1; u < h; ++u) z[u] = z[2 * u];
    return;
  }
  const Complex<T> zero = get(0);
  put(0, {zero.re + zero.im, zero.re - zero.im});
  for (int64_t k = 1; 2 * k < h; ++k) {
    const Complex<T> a = get(k), b = get(h - k);
    const Complex<T> s = a + conj(b), t = times(a - conj(b), f.split[2 * k], -f.split[2 * k + 1]);
    put(k, s - t);
    put(h - k, conj(s + t));
  }
  if (h % 2 == 0) {
    const Complex<T> half = get(h / 2);
    put(h / 2, conj(half + half));
  }
  passes<T, true>(f, z, 0, h);
}

}  // namespace c3a::cpu::C3A_LEVEL
