// Device functions around the transforms: conversion between dtypes, and the spectral product.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fft.h"
#include "launch.h"

namespace c3a {

__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

template <class Real, class T>
__device__ inline Real widen(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<Real>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<Real>(__half2float(value));
  } else {
    return static_cast<Real>(value);
  }
}

template <class T, class Real>
__device__ inline T narrow(Real value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (std::is_same_v<Real, double>) return __double2bfloat16(value);
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (std::is_same_v<Real, double>) return __double2half(value);
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class Real, class T>
__global__ void load(const T* in, Real* out, int64_t size) {
  for (int64_t e = first_element(); e < size; e += grid_stride()) out[e] = widen<Real>(in[e]);
}

// out = base + in * factor, rounded once; without a base, null, the product alone
template <class T, class Real>
__global__ void store(const Real* in, const T* base, T* out, int64_t size, Real factor) {
  for (int64_t e = first_element(); e < size; e += grid_stride()) {
    const Real onto = base ? widen<Real>(base[e]) : Real{0};
    out[e] = narrow<T>(onto + in[e] * factor);
  }
}

// One bin's matrix as a factor of a product: entry (row, column) lies at row * rows + column *
// columns, conjugated or not.
struct Factor {
  int64_t rows, columns, per_bin;
  bool conjugate;
};

struct Sizes {
  int64_t bins, rows, columns, terms;
};

// out[k, r, c] = sum_s a[k, r, s] b[k, s, c], every sum by one thread in the order of s: results
// depend on nothing else.
template <class Real>
__global__ void product(
    const Complex<Real>* a, Factor fa, const Complex<Real>* b, Factor fb, Complex<Real>* out,
    Sizes sizes) {
  const int64_t per_bin = sizes.rows * sizes.columns;
  for (int64_t e = first_element(); e < sizes.bins * per_bin; e += grid_stride()) {
    const int64_t k = e / per_bin;
    const int64_t r = e % per_bin / sizes.columns;
    const int64_t c = e % sizes.columns;
    const Complex<Real>* a_row = a + k * fa.per_bin + r * fa.rows;
    const Complex<Real>* b_column = b + k * fb.per_bin + c * fb.columns;
    Real real = 0, imaginary = 0;
    for (int64_t s = 0; s < sizes.terms; ++s) {
      const Complex<Real> p = a_row[s * fa.columns];
      const Complex<Real> q = b_column[s * fb.rows];
      const Real p_im = fa.conjugate ? -p.y : p.y;
      const Real q_im = fb.conjugate ? -q.y : q.y;
      real += p.x * q.x - p_im * q_im;
      imaginary += p.x * q_im + p_im * q.x;
    }
    out[e].x = real;
    out[e].y = imaginary;
  }
}

}  // namespace c3a
