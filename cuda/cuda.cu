// The CUDA back end: convert on load, cuFFT to spectra that lie bin by bin, one complex matrix
// product per bin, cuFFT back, scale and convert on store. Temporaries and cuFFT's workspaces come
// from torch's allocator on the current stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cpp/operators.h"
#include "fft.h"
#include "launch.h"
#include "spectral.h"

namespace c3a {
namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Call f with a null pointer of the device type that `type` names.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    default: throw std::logic_error("c3a: dtype was not checked");
  }
}

// One call of the operator on one stream, computing in Real.
template <class Real>
class Call {
 public:
  Call(const Problem& problem, const Tensor& like)
      : p_(problem), like_(like), stream_(current_stream(like)) {}

  // (rows, blocks * b) or (rows, blocks, b) numbers -> spectra, b^(bins, rows, blocks)
  Tensor spectra(const Tensor& a, int64_t rows, int64_t blocks) {
    const int64_t batch = rows * blocks, size = batch * p_.b;
    Tensor real = a;
    if (a.scalar_type() != kType) {
      real = reals(size);
      with_type(a.scalar_type(), [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        C3A_LAUNCH(
            (load<Real, T>), grid_for(size), kThreads, stream_, data<T>(a), data<Real>(real), size);
      });
    }
    Tensor a_hat = complexes(p_.bins() * batch);
    Plan<Real> plan(Direction::forward, p_.b, batch);
    const Tensor workspace = bytes(plan.workspace_bytes());
    plan.use(workspace.mutable_data_ptr(), stream_);
    plan.forward(data<Real>(real), data<Complex<Real>>(a_hat));
    return a_hat;
  }

  // a^ and b^ as Product's table has them -> out
  void contract(
      Product which, const Tensor& a_hat, const Tensor& b_hat, double scale, const Tensor* base,
      Tensor& out) {
    const int64_t t = p_.tokens, m = p_.m, n = p_.n;
    Factor fa, fb;
    Sizes sizes;
    switch (which) {
      case Product::forward:  // X (t, n), W^H (n, m)
        fa = {n, 1, t * n, false};
        fb = {1, n, m * n, true};
        sizes = {p_.bins(), t, m, n};
        break;
      case Product::input_grad:  // G (t, m), W (m, n)
        fa = {m, 1, t * m, false};
        fb = {n, 1, m * n, false};
        sizes = {p_.bins(), t, n, m};
        break;
      case Product::kernel_grad:  // G^H (m, t), X (t, n)
        fa = {1, m, t * m, true};
        fb = {n, 1, t * n, false};
        sizes = {p_.bins(), m, n, t};
        break;
    }
    const int64_t batch = sizes.rows * sizes.columns, size = batch * p_.b;
    const Tensor out_hat = complexes(p_.bins() * batch);
    C3A_LAUNCH(
        (product<Real>), grid_for(p_.bins() * batch), kThreads, stream_, data<Complex<Real>>(a_hat),
        fa, data<Complex<Real>>(b_hat), fb, data<Complex<Real>>(out_hat), sizes);
    const Tensor real = reals(size);
    Plan<Real> plan(Direction::inverse, p_.b, batch);
    const Tensor workspace = bytes(plan.workspace_bytes());
    plan.use(workspace.mutable_data_ptr(), stream_);
    plan.inverse(data<Complex<Real>>(out_hat), data<Real>(real));
    with_type(out.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const Real factor = static_cast<Real>(scale / static_cast<double>(p_.b));
      C3A_LAUNCH(
          (store<T, Real>), grid_for(size), kThreads, stream_, data<Real>(real),
          base ? data<T>(*base) : nullptr, data<T>(out), size, factor);
    });
  }

 private:
  static constexpr ScalarType kType =
      std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

  Tensor reals(int64_t size) const { return torch::stable::new_empty(like_, {size}, kType); }
  Tensor complexes(int64_t size) const { return reals(2 * size); }
  Tensor bytes(size_t size) const {
    return torch::stable::new_empty(like_, {static_cast<int64_t>(size)}, ScalarType::Byte);
  }

  const Problem& p_;
  const Tensor& like_;
  cudaStream_t stream_;
};

template <class F>
void with_real(ScalarType type, const F& f) {
  return type == ScalarType::Double ? f(static_cast<double*>(nullptr))
                                    : f(static_cast<float*>(nullptr));
}

struct Cuda {
  static void run(
      const Problem& p, Product which, const Tensor& a, const Tensor& b, double scale,
      const Tensor* base, Tensor& out) {
    const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
    with_real(compute_type({a, b, base ? *base : a}), [&](auto* type) {
      Call<std::remove_pointer_t<decltype(type)>> call(p, a);
      const int64_t a_blocks = which == Product::forward ? p.n : p.m;
      const int64_t b_rows = which == Product::kernel_grad ? p.tokens : p.m;
      const Tensor a_hat = call.spectra(a, p.tokens, a_blocks);
      const Tensor b_hat = call.spectra(b, b_rows, p.n);
      call.contract(which, a_hat, b_hat, scale, base, out);
    });
  }

  static void backward(
      const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
      Tensor& dw) {
    const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
    with_real(compute_type({g, x, w}), [&](auto* type) {
      Call<std::remove_pointer_t<decltype(type)>> call(p, g);
      const Tensor g_hat = call.spectra(g, p.tokens, p.m);
      call.contract(Product::input_grad, g_hat, call.spectra(w, p.m, p.n), scale, nullptr, dx);
      call.contract(
          Product::kernel_grad, g_hat, call.spectra(x, p.tokens, p.n), scale, nullptr, dw);
    });
  }
};

}  // namespace
}  // namespace c3a

STABLE_TORCH_LIBRARY_IMPL(c3a, CUDA, m) { c3a::Operators<c3a::Cuda>::register_all(m); }
