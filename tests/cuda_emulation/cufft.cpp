// cuFFT's calls that the library makes: real transforms by definition, in float64, stricter than
// cuFFT where that is silent. What cuFFT may overwrite becomes NaN: the workspace, an inverse
// transform's input.

#include <cufft.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numbers>
#include <thread>
#include <vector>

#include "device.h"

#define C3A_DOUBLE extern "C" C3A_EMULATION_EXPORT

using namespace c3a::emulation;

namespace {

struct Plan {
  int device = 0;
  bool made = false, allocates = true, busy = false;
  void* workspace = nullptr;
  cudaStream_t stream = nullptr;
  cufftType type{};
  int64_t length = 0, batch = 0, in_stride = 0, in_distance = 0, out_stride = 0, out_distance = 0;

  // Of no use here, but as large as a copy of the data: cuFFT may ask for that.
  size_t workspace_bytes() const {
    const bool wide = type == CUFFT_D2Z || type == CUFFT_Z2D;
    return static_cast<size_t>(batch * (length / 2 + 1)) * (wide ? 16 : 8);
  }
};

std::mutex mutex;
std::map<cufftHandle, std::unique_ptr<Plan>> plans;
cufftHandle next_handle = 1;

Plan* find(cufftHandle handle) {
  const std::lock_guard lock(mutex);
  const auto plan = plans.find(handle);
  return plan == plans.end() ? nullptr : plan->second.get();
}

#define C3A_MAY_FAIL(call) \
  if (const int code = planned_failure(call)) return static_cast<cufftResult>(code)

// exp(2 pi i k / length) for all k
std::vector<std::complex<double>> turns(int64_t length) {
  std::vector<std::complex<double>> table(length);
  for (int64_t k = 0; k < length; ++k) {
    const double angle =
        2 * std::numbers::pi * static_cast<double>(k) / static_cast<double>(length);
    table[k] = {std::cos(angle), std::sin(angle)};
  }
  return table;
}

template <class Real, class Complex>
void forward(const Plan& p, const Real* in, Complex* out) {
  const auto table = turns(p.length);
  for (int64_t t = 0; t < p.batch; ++t) {
    for (int64_t k = 0; k <= p.length / 2; ++k) {
      std::complex<double> sum = 0;
      for (int64_t u = 0; u < p.length; ++u) {
        const double x = in[t * p.in_distance + u * p.in_stride];
        sum += x * std::conj(table[k * u % p.length]);
      }
      Complex& to = out[t * p.out_distance + k * p.out_stride];
      to.x = static_cast<Real>(sum.real());
      to.y = static_cast<Real>(sum.imag());
    }
  }
}

template <class Real, class Complex>
void inverse(const Plan& p, Complex* in, Real* out) {
  const auto table = turns(p.length);
  for (int64_t t = 0; t < p.batch; ++t) {
    for (int64_t u = 0; u < p.length; ++u) {
      double sum = 0;
      for (int64_t k = 0; k <= p.length / 2; ++k) {
        const Complex& from = in[t * p.in_distance + k * p.in_stride];
        const bool own_mirror = k == 0 || 2 * k == p.length;  // cuFFT ignores its imaginary part
        const std::complex<double> value(from.x, own_mirror ? 0.0 : from.y);
        sum += (own_mirror ? 1 : 2) * (value * table[k * u % p.length]).real();
      }
      out[t * p.out_distance + u * p.out_stride] = static_cast<Real>(sum);
    }
  }
  constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
  for (int64_t t = 0; t < p.batch; ++t) {
    for (int64_t k = 0; k <= p.length / 2; ++k) {
      in[t * p.in_distance + k * p.in_stride] = {nan, nan};
    }
  }
}

template <class In, class Out, class F>
cufftResult execute(
    const char* call, cufftHandle handle, cufftType type, In* in, Out* out, const F& transform) {
  C3A_MAY_FAIL(call);
  Plan* const plan = find(handle);
  if (!plan || !plan->made || plan->type != type) return CUFFT_INVALID_PLAN;
  if (plan->device != current_device()) die(std::string(call) + " of a plan of another device");
  check_stream(call, plan->stream);
  // Real or complex, data must be aligned to a complex number.
  constexpr size_t alignment = std::max(sizeof(In), sizeof(Out));
  if (reinterpret_cast<uintptr_t>(in) % alignment || reinterpret_cast<uintptr_t>(out) % alignment) {
    die(std::string(call) + " of data that is not aligned to complex numbers");
  }
  if (static_cast<void*>(in) == static_cast<void*>(out)) die(std::string(call) + " in place");
  if (!plan->allocates) {
    if (!plan->workspace) return CUFFT_NO_WORKSPACE;
    std::memset(plan->workspace, 0xff, plan->workspace_bytes());
    plan->workspace = nullptr;  // one execution's: the memory may have gone elsewhere afterwards
  }
  {
    const std::lock_guard lock(mutex);
    if (plan->busy) die(std::string(call) + " of a plan that another thread is executing");
    plan->busy = true;
  }
  std::this_thread::sleep_for(std::chrono::microseconds(50));  // so that two threads do meet
  transform(*plan, in, out);
  note(call);
  const std::lock_guard lock(mutex);
  plan->busy = false;
  return CUFFT_SUCCESS;
}

}  // namespace

C3A_DOUBLE cufftResult cufftCreate(cufftHandle* handle) {
  C3A_MAY_FAIL("cufftCreate");
  const std::lock_guard lock(mutex);
  *handle = next_handle++;
  plans[*handle] = std::make_unique<Plan>();
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftDestroy(cufftHandle handle) {
  const std::lock_guard lock(mutex);
  const auto plan = plans.find(handle);
  if (plan == plans.end()) return CUFFT_INVALID_PLAN;
  if (plan->second->busy) die("cufftDestroy of a plan that is being executed");
  plans.erase(plan);
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftSetAutoAllocation(cufftHandle handle, int automatic) {
  C3A_MAY_FAIL("cufftSetAutoAllocation");
  Plan* const plan = find(handle);
  if (!plan || plan->made) return CUFFT_INVALID_PLAN;
  plan->allocates = automatic != 0;
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftMakePlanMany64(
    cufftHandle handle, int rank, long long* length, long long* in_embed, long long in_stride,
    long long in_distance, long long* out_embed, long long out_stride, long long out_distance,
    cufftType type, long long batch, size_t* workspace_bytes) {
  C3A_MAY_FAIL("cufftMakePlanMany64");
  Plan* const plan = find(handle);
  if (!plan || plan->made) return CUFFT_INVALID_PLAN;
  if (is_capturing(current_stream())) die("cufftMakePlanMany64 while a graph is captured");
  const bool forward = type == CUFFT_R2C || type == CUFFT_D2Z;
  if (rank != 1 || (!forward && type != CUFFT_C2R && type != CUFFT_Z2D)) return CUFFT_INVALID_TYPE;
  if (*length < 1 || batch < 1) return CUFFT_INVALID_SIZE;
  const long long bins = *length / 2 + 1;
  if (!in_embed || !out_embed) {  // cuFFT ignores the strides then
    in_stride = out_stride = 1;
    in_distance = forward ? *length : bins;
    out_distance = forward ? bins : *length;
  } else if (*in_embed < (forward ? *length : bins) || *out_embed < (forward ? bins : *length)) {
    return CUFFT_INVALID_SIZE;
  }
  *plan = {
      .device = current_device(),
      .made = true,
      .allocates = plan->allocates,
      .type = type,
      .length = *length,
      .batch = batch,
      .in_stride = in_stride,
      .in_distance = in_distance,
      .out_stride = out_stride,
      .out_distance = out_distance};
  *workspace_bytes = plan->workspace_bytes();
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftSetStream(cufftHandle handle, cudaStream_t stream) {
  C3A_MAY_FAIL("cufftSetStream");
  Plan* const plan = find(handle);
  if (!plan || !plan->made) return CUFFT_INVALID_PLAN;
  plan->stream = stream;
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftSetWorkArea(cufftHandle handle, void* workspace) {
  C3A_MAY_FAIL("cufftSetWorkArea");
  Plan* const plan = find(handle);
  if (!plan || !plan->made || plan->allocates) return CUFFT_INVALID_PLAN;
  plan->workspace = workspace;
  return CUFFT_SUCCESS;
}

C3A_DOUBLE cufftResult cufftExecR2C(cufftHandle handle, cufftReal* in, cufftComplex* out) {
  return execute("cufftExecR2C", handle, CUFFT_R2C, in, out, forward<float, cufftComplex>);
}
C3A_DOUBLE cufftResult cufftExecC2R(cufftHandle handle, cufftComplex* in, cufftReal* out) {
  return execute("cufftExecC2R", handle, CUFFT_C2R, in, out, inverse<float, cufftComplex>);
}
C3A_DOUBLE cufftResult
cufftExecD2Z(cufftHandle handle, cufftDoubleReal* in, cufftDoubleComplex* out) {
  return execute("cufftExecD2Z", handle, CUFFT_D2Z, in, out, forward<double, cufftDoubleComplex>);
}
C3A_DOUBLE cufftResult
cufftExecZ2D(cufftHandle handle, cufftDoubleComplex* in, cufftDoubleReal* out) {
  return execute("cufftExecZ2D", handle, CUFFT_Z2D, in, out, inverse<double, cufftDoubleComplex>);
}
