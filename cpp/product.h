// The terms of spectral products, conj(w) x, on spectra of numbers (two planes, real and imaginary
// parts) and on spectra of pairs (cpu_kernel.h), whose terms are two dot products.

#pragma once

#include "fft.h"

namespace c3a::cpu::C3A_LEVEL {

// What is multiplied in a slot: two real bins each; weights, conjugated, with activations, from the
// left or from the right; or two activations, the left one conjugated. The sums of `left` and
// `right` have the same bits.
enum class Product { real, left, right, conjugated };

// How spectra are stored as S and multiplied: read() takes a vector of the right factor, scalar()
// and column() a number or a vector of the left one, add() adds their product. Sums are vectors V,
// of whole registers or of parts.
template <class S>
struct Arithmetic {
  using T = S;

  static constexpr Product of_slot_0(Product) { return Product::real; }
  static Product product_of(const Multiplication<T, S>& p) {
    return p.weights == Weights::left ? Product::left : Product::right;
  }

  static C3A_INLINE void store_activations(T* p, int64_t width, const Complex<T>& value, int room) {
    store_lanes(p, value.re, room);
    store_lanes(p + width, value.im, room);
  }
  static C3A_INLINE void store_weights(
      T* p, int64_t width, int64_t, const Complex<T>& value, int room) {
    store_activations(p, width, value, room);
  }

  template <Product, class V = Vec<T>>
  static C3A_INLINE Complex<T, V> read(const T* p, int64_t imaginary) {
    return {load<V>(p), load<V>(p + imaginary)};
  }
  // Keeps what was read in registers: a product with memory would load it once more.
  template <class V>
  static C3A_INLINE void keep(Complex<T, V>& y) {
#if defined(__x86_64__)
    asm("" : "+v"(y.re), "+v"(y.im));
#else
    (void)y;
#endif
  }
  struct Scalar {
    T re, im;
  };
  template <class V = Vec<T>>
  static C3A_INLINE Scalar scalar(const T* p, int64_t imaginary) {
    return {p[0], p[imaginary]};
  }
  static C3A_INLINE Complex<T> column(const T* p, int64_t imaginary) {
    return read<Product::left>(p, imaginary);
  }

  template <Product kProduct, class X, class V>
  static C3A_INLINE void add(Complex<T, V>& sum, const X& x, const Complex<T, V>& y) {
    if constexpr (kProduct == Product::real) {
      sum.re += y.re * x.re;
      sum.im += y.im * x.im;
    } else {
      // The weights' real part comes first, wherever they are.
      constexpr bool right = kProduct == Product::right;
      sum.re += y.re * x.re;
      const V first = right ? y.re * x.im : y.im * x.re;
      const V second = right ? y.im * x.re : y.re * x.im;
      sum.re += y.im * x.im;
      sum.im = sum.im + first - second;
    }
  }
};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<Pair> {
  using T = float;
  template <class V>
  using Words = typename VectorOf<uint32_t, sizeof(V)>::type;

  static constexpr Product of_slot_0(Product product) {
    return product == Product::conjugated ? Product::real : product;
  }
  static Product product_of(const Multiplication<T, Pair>& p) {
    return p.a.imaginary ? Product::left : p.b.imaginary ? Product::right : Product::conjugated;
  }

  static C3A_INLINE void store_activations(Pair* p, int64_t, const Complex<T>& value, int room) {
    store_lanes(p, pairs_of_floats(value.re, value.im), room);
  }
  static C3A_INLINE void store_weights(
      Pair* p, int64_t width, int64_t slot, const Complex<T>& value, int room) {
    const Vec<T> zero{};
    store_lanes(p, pairs_of_floats(value.re, slot ? value.im : zero), room);
    store_lanes(
        p + width, pairs_of_floats(slot ? -value.im : zero, slot ? value.re : value.im), room);
  }

  // What is multiplied to the real part and to the imaginary one.
  template <class V>
  struct Factors {
    Words<V> for_re, for_im;
  };
  template <Product kProduct, class V = Vec<T>>
  static C3A_INLINE Factors<V> read(const Pair* p, int64_t imaginary) {
    const auto v = load<Words<V>>(p);
    if constexpr (kProduct == Product::real) {
      return {v & 0xffffu, v & 0xffff0000u};
    } else if constexpr (kProduct == Product::conjugated) {
      return {v, (v >> 16 | v << 16) ^ 0x80000000u};  // (im, -re)
    } else if constexpr (kProduct == Product::right) {
      return {v, load<Words<V>>(p + imaginary)};
    } else {
      return {v, v};
    }
  }
  template <class V>
  static C3A_INLINE void keep(Factors<V>&) {}  // each part is multiplied once
  template <class V = Vec<T>>
  static C3A_INLINE Factors<V> scalar(const Pair* p, int64_t imaginary) {
    return {broadcast<V>(p[0]), broadcast<V>(p[imaginary])};
  }
  static C3A_INLINE Factors<Vec<T>> column(const Pair* p, int64_t) {
    return read<Product::left>(p, 0);
  }

  template <Product, class V>
  static C3A_INLINE void add(Complex<T, V>& sum, const Factors<V>& x, const Factors<V>& y) {
    sum.re = dot(sum.re, x.for_re, y.for_re);
    sum.im = dot(sum.im, x.for_im, y.for_im);
  }

 private:
  template <class V>
  static C3A_INLINE Words<V> broadcast(const Pair& pair) {
    Words<V> words = Words<V>{} + pair.bits;
#if defined(__clang__) && __clang_major__ == 16
    // It crashes on the cast of a broadcast word to pairs, so it must not know that this is one.
    asm("" : "+v"(words));
#endif
    return words;
  }
  template <class V>
  static C3A_INLINE V dot(const V& sum, const Words<V>& x, const Words<V>& y) {
    if constexpr (sizeof(V) == 64) {
      return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    } else {
      return (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)y);
    }
  }
};
#endif

}  // namespace c3a::cpu::C3A_LEVEL
