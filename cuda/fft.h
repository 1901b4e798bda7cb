// Real transforms of signals in shared memory, b = 2 h = 2^(kLog + 1) numbers each, by all threads
// of a thread block: h complex numbers z[u] = x[2u] + i x[2u+1] become, in place and up to a
// factor, the spectrum. Slot p holds bin reverse(p), p's kLog bits reversed; slot 0 holds the real
// bins 0 and h as one number.
//
// Passes of decimation in frequency leave Z in that order, where the slots of Z[k] and Z[h-k] are p
// and p ^ (top - 1), top the highest bit of p. Then, with w = exp(-2 pi i / b),
//
//   s = Z[k] + conj(Z[h-k])   t = i w^k (Z[k] - conj(Z[h-k]))
//   2 X[k] = s - t            2 X[h-k] = conj(s + t)
//
// The inverse takes the same steps backwards. Forward and inverse multiply by 2 and by b.

#pragma once

#include <cstdint>

#include "../cpp/turns.h"
#include "kernels.h"
#include "launch.h"

namespace c3a::cuda {

constexpr int kTurn = static_cast<int>(kLongestFused);

struct Turns {
  float2 at[kTurn];  // exp(-2 pi i k / kTurn)
};

// Computed in float64 and rounded once.
constexpr Turns make_turns() {
  Turns turns{};
  for (int k = 0; k < kTurn; ++k) {
    const double c = c3a::turn<double>(k, kTurn, false), s = c3a::turn<double>(k, kTurn, true);
    turns.at[k] = {static_cast<float>(c), static_cast<float>(-s)};
  }
  return turns;
}

__device__ const Turns kTurns = make_turns();

// exp(-2 pi i k / n), n a power of two up to kTurn
__device__ inline float2 turn(int k, int n) { return kTurns.at[k * (kTurn / n)]; }

__device__ inline float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ inline float2 conj(float2 a) { return {a.x, -a.y}; }
__device__ inline float2 times(float2 a, float2 b) {
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}

// Where number i of all signals lies: numbers that threads access together, neighbours or 4 to 16
// apart, in different banks. place(a ^ b) is place(a) ^ place(b), so that one of them can be a
// constant, and what is a multiple of four signals stays where it is.
template <int kLog>
__device__ constexpr int place(int i) {
  constexpr int kMask = kLog >= 6 ? 15 : (1 << (kLog - 2)) - 1;
  return i ^ (i >> 4 & kMask);
}
template <int kLog>
__device__ inline int place(int signal, int u) {
  return place<kLog>((signal << kLog) + u);
}

// a times exp(-2 pi i q / 16), or its conjugate, q < 8
template <bool kConjugate>
__device__ inline float2 turned(float2 a, int q) {
  constexpr float c1 = 0.92387953251128675613f, c2 = 0.70710678118654752440f;
  constexpr float c3 = 0.38268343236508977173f;
  constexpr float cosine[8] = {1, c1, c2, c3, 0, -c3, -c2, -c1};
  constexpr float sine[8] = {0, c3, c2, c1, 1, c1, c2, c3};
  const float s = kConjugate ? sine[q] : -sine[q];
  if (q == 0) return a;
  if (q == 4) return {-s * a.y, s * a.x};
  return times(a, {cosine[q], s});
}

__device__ constexpr int reversed(int i, int bits) {
  int r = 0;
  for (int bit = 0; bit < bits; ++bit) r = 2 * r + (i >> bit & 1);
  return r;
}

// a[reversed(q)] <- sum_p a[p] exp(-2 pi i p q / R), by decimation in frequency
template <int R>
__device__ inline void dft(float2 (&a)[R]) {
#pragma unroll
  for (int half = R / 2; half >= 1; half /= 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (i & half) continue;
      const float2 p = a[i], q = a[i + half];
      a[i] = p + q;
      a[i + half] = turned<false>(p - q, i % half * (8 / half));
    }
  }
}

// R times what undoes it, by decimation in time
template <int R>
__device__ inline void undo_dft(float2 (&a)[R]) {
#pragma unroll
  for (int half = 1; half < R; half *= 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (i & half) continue;
      const float2 p = a[i], q = turned<true>(a[i + half], i % half * (8 / half));
      a[i] = p + q;
      a[i + half] = p - q;
    }
  }
}

// The radix, as its logarithm, of the first pass over 2^log numbers: few passes of 4 to 16.
__device__ constexpr int first_radix(int log) {
  return log == 4 || log == 7 || log == 8 || log == 10 ? 4 : log < 3 ? log : 3;
}

// Every thread block of 2^kLength numbers within signals of 2^kLog goes through one radix.
template <int kLog, int kLength, bool kInverse>
__device__ inline void pass(float2* z, int signals) {
  constexpr int kRadix = first_radix(kLength), R = 1 << kRadix;
  constexpr int kRest = kLength - kRadix;  // numbers R apart in order: 2^kRest
  const int items = signals << (kLog - kRadix);
  for (int e = threadIdx.x; e < items; e += kThreads) {
    const int u = e & ((1 << kRest) - 1);
    const int first = place<kLog>(((e >> kRest) << kLength) + u);
    float2 a[R];
#pragma unroll
    for (int q = 0; q < R; ++q) a[q] = z[first ^ place<kLog>(q << kRest)];
    if constexpr (!kInverse) dft(a);
    if constexpr (kRest > 0) {
#pragma unroll
      for (int q = 1; q < R; ++q) {
        const float2 w = turn(u * reversed(q, kRadix), 1 << kLength);
        a[q] = times(a[q], kInverse ? conj(w) : w);
      }
    }
    if constexpr (kInverse) undo_dft(a);
#pragma unroll
    for (int q = 0; q < R; ++q) z[first ^ place<kLog>(q << kRest)] = a[q];
  }
  __syncthreads();
}

template <int kLog, int kLength = kLog>
__device__ inline void passes(float2* z, int signals) {
  pass<kLog, kLength, false>(z, signals);
  constexpr int kRest = kLength - first_radix(kLength);
  if constexpr (kRest > 0) passes<kLog, kRest>(z, signals);
}

template <int kLog, int kLength = kLog>
__device__ inline void undo_passes(float2* z, int signals) {
  constexpr int kRest = kLength - first_radix(kLength);
  if constexpr (kRest > 0) undo_passes<kLog, kRest>(z, signals);
  pass<kLog, kLength, true>(z, signals);
}

// Between Z and X; each pair of slots by one thread, slots 0 and 1 by another.
template <int kLog, bool kInverse>
__device__ inline void split(float2* z, int signals) {
  constexpr int h = 1 << kLog;
  for (int e = threadIdx.x; e < signals << (kLog - 1); e += kThreads) {
    const int pair = e & (h / 2 - 1), signal = place<kLog>((e >> (kLog - 1)) << kLog);
    if (pair == 0) {
      float2 &zero = z[signal], &half = z[signal ^ 1];
      const float factor = kInverse ? 1.0f : 2.0f;
      zero = {factor * (zero.x + zero.y), factor * (zero.x - zero.y)};
      half = {2 * half.x, -2 * half.y};
      continue;
    }
    const int top = 1 << (31 - __clz(pair)), p = pair + top;
    float2 &at_p = z[signal ^ place<kLog>(p)], &at_q = z[signal ^ place<kLog>(p ^ (2 * top - 1))];
    const float2 a = at_p, b = at_q;
    const float2 w = turn(static_cast<int>(__brev(p) >> (32 - kLog)), 2 * h);
    const float2 i_w = kInverse ? float2{w.y, w.x} : float2{-w.y, w.x};
    const float2 s = a + conj(b), t = times(a - conj(b), i_w);
    // The inverse multiplies by i conj(w) and adds where the forward subtracts.
    at_p = kInverse ? s + t : s - t;
    at_q = conj(kInverse ? s - t : s + t);
  }
  __syncthreads();
}

template <int kLog>
__device__ inline void forward(float2* z, int signals) {
  passes<kLog>(z, signals);
  split<kLog, false>(z, signals);
}

template <int kLog>
__device__ inline void inverse(float2* z, int signals) {
  split<kLog, true>(z, signals);
  undo_passes<kLog>(z, signals);
}

}  // namespace c3a::cuda
