// What cpu.cpp asks of an instruction-set level: plain structs and pointers, so that nothing that
// is compiled for a level can leak into code that runs without it.
//
// The spectrum of a real signal of length b lies in slots() complex numbers: for even b, slot 0
// holds the two real bins 0 and b/2 as its parts and slot k bin k; for odd b slot k holds bin k.

#pragma once

#include <cstdint>

#include "element.h"

namespace c3a::cpu {

// The discrete Fourier transform of real signals of length b, as cpu_plan.cpp plans it. An even b
// goes by complex transforms of half the length, h = b / 2; an odd one by h = b.
template <class T>
struct Transform {
  int64_t b, h;
  int passes;
  const int32_t* radices;    // their product is h
  const T* const* twiddles;  // of pass p: (re, im) for k < m, 1 <= q < r, k slowest
  const T* split;            // (re, im) of i exp(-2 pi i k / b) for k <= h / 2; even b
  const int32_t* position;   // where the passes leave bin k < h
  int64_t slots() const { return (b + 1) / 2; }
  // synthesise(analyse(x) * analyse(w)) is this much more than the circular convolution
  T gain() const { return static_cast<T>(b % 2 == 0 ? 4 * b : b); }
  // floats or doubles that a transform of `lanes` signals works in
  int64_t scratch(int64_t lanes) const { return 2 * h * lanes; }
};

// rows x columns real signals: signal (r, c) starts at r * row + c * column. A level takes
// consecutive columns as the lanes of its vectors.
struct Signals {
  const void* data;
  Element type;
  int64_t row, column;
};

// Where results go: rounded to `type`, onto `base` (of that type, strided like the result) if
// given.
struct Results {
  void* data;
  const void* base;
  Element type;
  int64_t row, column;
};

// Two parts of a complex number, rounded to bfloat16: the real one lower.
struct Pair {
  uint32_t bits;
};

// The spectra of rows x width signals, slot by slot: at slot q, row r, column c the real part is
// data[q * slot + r * row + c], the imaginary part `width` further on. Pairs hold both parts in one
// place. Those of weights, (u, v), have a second plane all the same, with (-v, u): with it both
// parts of a product of pairs are dot products. In slot 0 their planes are (u, 0) and (0, v).
template <class S>
struct Spectra {
  S* data;
  int64_t slot, row, width;
};

// One matrix of each slot, read or written by strides; `imaginary` is 0 for pairs without a second
// plane.
template <class S>
struct Matrix {
  S* data;
  int64_t slot, row, column, imaginary;
};

// c = a b (+ c), complex, slot by slot; b and c are vectors along their columns, a is scalars. One
// factor, the weights, is conjugated; its place decides only in which order a sum's terms are
// added, so that the results do not depend on it. The terms are summed first, then added to c:
// errors grow with the terms of a call and the number of calls, not with their product.
enum class Weights : uint8_t { left, right };

template <class T, class S>
struct Multiplication {
  int64_t slots, rows, terms, columns;
  Matrix<const S> a, b;
  Matrix<T> c;
  Weights weights;
  bool accumulate;
};

// Memory that a caller will need, prefetched by the way: `soon` within the present function and the
// next, `later` a little further on.
struct Range {
  const char *begin, *end;
};
struct Ahead {
  Range soon, later;
};

// What the spectra are that analyse() makes: of activations, or of weights, which are conjugated
// where they are those of the transposed matrix.
enum class Role : uint8_t { activations, weights, transposed_weights };

// Signals are computed with and summed in T, and their spectra multiplied as S: T itself, or Pair.
template <class T, class S>
struct Kernel {
  int lanes;
  // spectra of the signals, times `factor`; columns up to a multiple of `lanes` are filled with
  // zeros where `out.width` has room for them
  void (*analyse)(
      const Transform<T>&, const Signals&, int64_t rows, int64_t columns, T factor, Role,
      const Spectra<S>& out, T* scratch, Ahead&);
  // the inverse, without its factor
  void (*synthesise)(
      const Transform<T>&, const Spectra<T>&, int64_t rows, int64_t columns, const Results& out,
      T* scratch, Ahead&);
  void (*multiply)(const Multiplication<T, S>&, Ahead&);
  // c(i, j) = sum over columns of conj(a(i, column)) b(j, column) (+ c)
  void (*correlate)(
      int64_t slots, int64_t rows, int64_t columns_of_c, int64_t columns, const Spectra<S>& a,
      const Spectra<S>& b, const Spectra<T>& c, bool accumulate);
};

// A level's kernels; cpu_kernel.cpp defines one object of each for every level that is built.
struct Level {
  Kernel<float, float> f32;
  Kernel<double, double> f64;
};

}  // namespace c3a::cpu
