// Batched real transforms by cuFFT, spectra laid out bin by bin: element k of transform t lies at
// k * batch + t, so that one bin of all transforms is a dense matrix.

#pragma once

#include <cufft.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <type_traits>

namespace c3a {

inline const char* name(cufftResult result) {
  switch (result) {
    case CUFFT_SUCCESS: return "CUFFT_SUCCESS";
    case CUFFT_INVALID_PLAN: return "CUFFT_INVALID_PLAN";
    case CUFFT_ALLOC_FAILED: return "CUFFT_ALLOC_FAILED";
    case CUFFT_INVALID_TYPE: return "CUFFT_INVALID_TYPE";
    case CUFFT_INVALID_VALUE: return "CUFFT_INVALID_VALUE";
    case CUFFT_INTERNAL_ERROR: return "CUFFT_INTERNAL_ERROR";
    case CUFFT_EXEC_FAILED: return "CUFFT_EXEC_FAILED";
    case CUFFT_SETUP_FAILED: return "CUFFT_SETUP_FAILED";
    case CUFFT_INVALID_SIZE: return "CUFFT_INVALID_SIZE";
    case CUFFT_INVALID_DEVICE: return "CUFFT_INVALID_DEVICE";
    case CUFFT_NO_WORKSPACE: return "CUFFT_NO_WORKSPACE";
    case CUFFT_NOT_IMPLEMENTED: return "CUFFT_NOT_IMPLEMENTED";
    case CUFFT_NOT_SUPPORTED: return "CUFFT_NOT_SUPPORTED";
    default: return "an unknown cuFFT error";
  }
}

inline void check_cufft(cufftResult result, const char* call) {
  if (result == CUFFT_SUCCESS) return;
  std::ostringstream message;
  message << "c3a: " << call << " failed: " << name(result);
  throw std::runtime_error(message.str());
}

#define C3A_CUFFT_CHECK(call) ::c3a::check_cufft((call), #call)

template <class Real>
struct ComplexOf {
  using type = std::conditional_t<std::is_same_v<Real, double>, cufftDoubleComplex, cufftComplex>;
};
template <class Real>
using Complex = typename ComplexOf<Real>::type;

enum class Direction { forward, inverse };  // R2C, C2R; both unscaled

// One plan. The caller gives its workspace, which must outlive the execution.
template <class Real>
class Plan {
 public:
  Plan(Direction direction, int64_t length, int64_t batch) {
    constexpr bool wide = std::is_same_v<Real, double>;
    const cufftType type = direction == Direction::forward ? (wide ? CUFFT_D2Z : CUFFT_R2C)
                                                           : (wide ? CUFFT_Z2D : CUFFT_C2R);
    long long n = length, real_size = length, bins = length / 2 + 1;
    C3A_CUFFT_CHECK(cufftCreate(&handle_));
    try {
      C3A_CUFFT_CHECK(cufftSetAutoAllocation(handle_, 0));
      if (direction == Direction::forward) {
        C3A_CUFFT_CHECK(cufftMakePlanMany64(
            handle_, /* rank= */ 1, &n, &real_size, /* istride= */ 1, /* idist= */ length, &bins,
            /* ostride= */ batch, /* odist= */ 1, type, batch, &workspace_bytes_));
      } else {
        C3A_CUFFT_CHECK(cufftMakePlanMany64(
            handle_, /* rank= */ 1, &n, &bins, /* istride= */ batch, /* idist= */ 1, &real_size,
            /* ostride= */ 1, /* odist= */ length, type, batch, &workspace_bytes_));
      }
    } catch (...) {
      cufftDestroy(handle_);
      throw;
    }
  }
  ~Plan() { cufftDestroy(handle_); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  size_t workspace_bytes() const { return workspace_bytes_; }

  void use(void* workspace, cudaStream_t stream) {
    C3A_CUFFT_CHECK(cufftSetWorkArea(handle_, workspace));
    C3A_CUFFT_CHECK(cufftSetStream(handle_, stream));
  }

  void forward(const Real* in, Complex<Real>* out) {
    Real* input = const_cast<Real*>(in);  // out of place, a forward transform leaves it as it is
    if constexpr (std::is_same_v<Real, double>) {
      C3A_CUFFT_CHECK(cufftExecD2Z(handle_, input, out));
    } else {
      C3A_CUFFT_CHECK(cufftExecR2C(handle_, input, out));
    }
  }

  // Overwrites `in`.
  void inverse(Complex<Real>* in, Real* out) {
    if constexpr (std::is_same_v<Real, double>) {
      C3A_CUFFT_CHECK(cufftExecZ2D(handle_, in, out));
    } else {
      C3A_CUFFT_CHECK(cufftExecC2R(handle_, in, out));
    }
  }

 private:
  cufftHandle handle_ = 0;
  size_t workspace_bytes_ = 0;
};

}  // namespace c3a
