// Device functions for numbers of every type: conversions, and groups of 16 bytes.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "kernels.h"

namespace c3a::cuda {

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

// Neighbours that one instruction loads or stores.
template <class T>
struct alignas(16) Group {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T values[kSize];
};

template <class T>
__device__ inline Group<T> load_group(const T* p) {
  Group<T> group;
  *reinterpret_cast<uint4*>(&group) = *reinterpret_cast<const uint4*>(p);
  return group;
}
// By an intrinsic: the compiler takes other stores apart.
template <class T>
__device__ inline void store_group(T* p, const Group<T>& group) {
  __stwb(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&group));
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a null pointer of the device type that `type` names; float64 where kWide only.
template <bool kWide, class F>
inline void with_type(Element type, const F& f) {
  switch (type) {
    case Element::f64:
      if constexpr (kWide) {
        return f(static_cast<double*>(nullptr));
      } else {
        throw std::logic_error("float64 among numbers whose sums run in float32");
      }
    case Element::f32: return f(static_cast<float*>(nullptr));
    case Element::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Element::f16: return f(static_cast<__half*>(nullptr));
  }
}

}  // namespace c3a::cuda
