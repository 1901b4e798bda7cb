// The CUDA back end. Two paths: fused (fused.cu), one launch for a tile of tokens, and cuFFT's,
// chunk by chunk: convert, transform to spectra that lie bin by bin, one complex matrix product per
// bin, transform back, add and convert. Everything is enqueued on the current stream; temporaries
// and cuFFT's workspaces come from torch's allocator.

#include "cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "../cpp/cuda_controls.h"
#include "../cpp/dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "plans.h"

namespace c3a::cuda {
namespace {

enum class Path { automatic, fused, cufft };

Path path_named(const std::string& what, const std::string& name) {
  if (name == "auto") return Path::automatic;
  if (name == "fused") return Path::fused;
  if (name == "cufft") return Path::cufft;
  throw std::runtime_error("c3a: expected " + what + " to be auto, fused or cufft, got " + name);
}

// What C3A_CUDA_PATH, C3A_CUDA_TEMPORARY_MIB and C3A_CUDA_PLANS give, or defaults; c3a._C changes
// it. The library is loaded where nobody could catch an error: what is wrong with the variables is
// said at first use.
class Controls final : public CudaControls {
 public:
  Controls() {
    *c3a_cuda_controls() = this;
    try {
      plans_.set_capacity(number("C3A_CUDA_PLANS", 64));
      temporary_limit_ = number("C3A_CUDA_TEMPORARY_MIB", 256) << 20;
      const char* path = std::getenv("C3A_CUDA_PATH");
      if (path) path_ = path_named("C3A_CUDA_PATH", path);
    } catch (const std::exception& error) {
      wrong_ = error.what();
    }
  }

  // Throws what was wrong with the environment.
  void check() const {
    if (!wrong_.empty()) throw std::runtime_error(wrong_);
  }

  PlanCacheFacts plan_cache() override {
    check();
    return plans_.facts();
  }
  void set_plan_cache_capacity(int64_t capacity) override { plans_.set_capacity(capacity); }
  void clear_plan_cache() override { plans_.clear(); }

  int64_t temporary_limit() override {
    check();
    return temporary_limit_;
  }
  void set_temporary_limit(int64_t bytes) override {
    if (bytes < 1) {
      throw std::runtime_error("c3a: expected a limit in bytes >= 1, got " + std::to_string(bytes));
    }
    temporary_limit_ = bytes;
  }

  std::string path() override {
    check();
    const Path path = path_;
    return path == Path::automatic ? "auto" : path == Path::fused ? "fused" : "cufft";
  }
  void set_path(const std::string& name) override { path_ = path_named("the CUDA path", name); }

  Path chosen_path() const { return path_; }
  PlanCache& plans() { return plans_; }

 private:
  static int64_t number(const std::string& variable, int64_t otherwise) {
    const char* text = std::getenv(variable.c_str());
    if (!text) return otherwise;
    constexpr int64_t kMost = 1 << 30;
    char* end = nullptr;
    const int64_t value = std::strtoll(text, &end, 10);
    if (end != text && *end == '\0' && value >= 1 && value <= kMost) return value;
    throw std::runtime_error(
        "c3a: expected " + variable + " to be a number from 1 to " + std::to_string(kMost) +
        ", got '" + text + "'");
  }

  PlanCache plans_{1};
  std::atomic<int64_t> temporary_limit_ = 1;
  std::atomic<Path> path_ = Path::automatic;
  std::string wrong_;
};

// Never destroyed: at exit the driver may be gone before the plans.
Controls& controls = *new Controls;

Device current_device() {
  controls.check();
  Device device{};
  C3A_CUDA_CHECK(cudaGetDevice(&device.index));
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    C3A_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device.index));
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor);
  const int minor = ask(cudaDevAttrComputeCapabilityMinor);
  if (major * 10 + minor < 75 || !has_code()) {
    std::ostringstream message;
    message << "c3a: cuda:" << device.index << " has compute capability " << major << '.' << minor
            << ", and this build of the CUDA library has code for " << C3A_CUDA_ARCHITECTURES
            << ": use a build for that device, or the CPU";
    throw std::runtime_error(message.str());
  }
  device.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  device.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Element element(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Element::f64;
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: throw std::logic_error("c3a: dtype was not checked");
  }
}

// A contiguous tensor from its element `first` on, to be written, or only to be read: then a tensor
// that is copied on write stays as it is.
Numbers numbers(const Tensor& t, int64_t first = 0) {
  const Element type = element(t.scalar_type());
  return {static_cast<char*>(t.mutable_data_ptr()) + first * bytes_of(type), type};
}
Numbers operand(const Tensor& t, int64_t first = 0) {
  const Element type = element(t.scalar_type());
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {data + first * bytes_of(type), type};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// One call of the operator on the current device and stream.
class Call {
 public:
  Call(const Problem& problem, const Tensor& like)
      : p_(problem), like_(like), device_(current_device()), stream_(current_stream(like)) {}

  // The path for the forward or the input gradient. In units of bytes from the device's memory, the
  // second-level cache being twice as fast: cuFFT's path moves 16 bytes more for every number in
  // and out, and the kernel's spectra once; the fused one moves the spectra through the cache for
  // every tile.
  bool is_fused(Product which, ScalarType type) const {
    const Path path = controls.chosen_path();
    if (path == Path::cufft || type == ScalarType::Double) return false;
    const Tile tile = tile_of(which);
    if (tile.tokens == 0 || path == Path::fused) return tile.tokens > 0;
    const int64_t spectra = 4 * p_.m * p_.n * p_.b;
    const int64_t tiles = (p_.tokens + tile.tokens - 1) / tile.tokens;
    return tiles * (spectra / 2) <=
           p_.tokens * 16 * (p_.in_features() + p_.out_features()) + spectra;
  }

  void run_fused(
      Product which, const Tensor& a, const Tensor& w, double scale, const Tensor* base,
      Tensor& out) const {
    const Tensor w_hat = empty<float>(p_.m * p_.n * p_.b);
    const float factor = static_cast<float>(scale) * fused_factor(p_.b);
    kernel_spectra(p_.b, operand(w), data<float2>(w_hat), p_.m * p_.n, factor, device_, stream_);
    const bool forward = which == Product::forward;
    const Fused fused_problem{
        .b = p_.b,
        .tokens = p_.tokens,
        .in_blocks = forward ? p_.n : p_.m,
        .out_blocks = forward ? p_.m : p_.n,
        .in = operand(a),
        .out = numbers(out),
        .base = base ? operand(*base).data : nullptr,
        .w_hat = data<float2>(w_hat),
        .w_out = forward ? p_.n : 1,
        .w_in = forward ? 1 : p_.n,
        .conjugate = forward};
    fused(fused_problem, tile_of(which), device_, stream_);
  }

  // The rows of Product's table by cuFFT, sums in Real. Any of the results may be left out: `out`
  // by a null `w`, `dw` by a null `x`.
  template <class Real>
  void run_cufft(
      Product which, const Tensor& a, const Tensor* w, const Tensor* x, double scale,
      const Tensor* base, Tensor* out, Tensor* dw) const {
    const Real factor = static_cast<Real>(scale / static_cast<double>(p_.b));
    const int64_t a_blocks = which == Product::forward ? p_.n : p_.m;
    const int64_t out_blocks = which == Product::forward ? p_.m : p_.n;
    Tensor w_hat = like_, dw_hat = like_;
    if (w) w_hat = spectra<Real>(operand(*w), p_.m, p_.m, p_.n, factor);
    if (x) dw_hat = complexes<Real>({p_.bins(), p_.m, p_.n});
    const int64_t size = chunk<Real>();
    for (int64_t first = 0; first < p_.tokens; first += size) {
      const int64_t tokens = std::min(size, p_.tokens - first), rows = planned(tokens);
      const Tensor a_hat =
          spectra<Real>(operand(a, first * a_blocks * p_.b), tokens, rows, a_blocks, Real{1});
      if (w) {
        const Tensor out_hat = contract<Real>(which, a_hat, w_hat, rows);
        const int64_t begin = first * out_blocks * p_.b;
        finish<Real>(
            out_hat, tokens, rows, out_blocks, Real{1}, base ? operand(*base, begin).data : nullptr,
            numbers(*out, begin));
      }
      if (x) {
        const Tensor x_hat =
            spectra<Real>(operand(*x, first * p_.n * p_.b), tokens, rows, p_.n, Real{1});
        accumulate<Real>(a_hat, x_hat, rows, first > 0, dw_hat);
      }
    }
    if (x) finish<Real>(dw_hat, p_.m, p_.m, p_.n, factor, nullptr, numbers(*dw));
  }

 private:
  Tile tile_of(Product which) const {
    const int64_t in_blocks = which == Product::forward ? p_.n : p_.m;
    return fused_tile(p_.b, in_blocks, device_.shared_bytes_per_block);
  }

  // Tokens at a time, so that what a call holds at once stays about within the limit: the spectra
  // of both sides, and numbers and cuFFT's workspace for the larger one. Chunks of one size, but
  // for the last.
  template <class Real>
  int64_t chunk() const {
    const int64_t spectrum = p_.bins() * static_cast<int64_t>(sizeof(Complex<Real>));
    const int64_t bytes = (p_.m + p_.n + 2 * std::max(p_.m, p_.n)) * spectrum;
    const int64_t most = std::max<int64_t>(1, controls.temporary_limit() / bytes);
    const int64_t chunks = (p_.tokens + most - 1) / most;
    return (p_.tokens + chunks - 1) / chunks;
  }

  // The number of rows that are transformed for so many tokens: up to an eighth more, zeros, so
  // that batches of any size share eight plans between powers of two.
  static int64_t planned(int64_t tokens) {
    int64_t step = 1;
    while (16 * step <= tokens) step *= 2;
    return (tokens + step - 1) / step * step;
  }

  // given * blocks * b numbers times a factor, and zeros for more rows -> (bins, rows, blocks)
  template <class Real>
  Tensor spectra(const Numbers& a, int64_t given, int64_t rows, int64_t blocks, Real factor) const {
    const int64_t batch = rows * blocks;
    constexpr Element type = std::is_same_v<Real, double> ? Element::f64 : Element::f32;
    // cuFFT wants real numbers aligned to complex ones.
    const bool as_it_is = a.type == type && factor == 1 && given == rows &&
                          reinterpret_cast<uintptr_t>(a.data) % sizeof(Complex<Real>) == 0;
    Tensor converted = like_;
    void* real = a.data;
    if (!as_it_is) {
      converted = empty<Real>(batch * p_.b);
      real = data<Real>(converted);
      load(a, data<Real>(converted), given * blocks * p_.b, batch * p_.b, factor, stream_);
    }
    const Tensor a_hat = complexes<Real>({p_.bins(), rows, blocks});
    transform(kForward<Real>, batch, real, a_hat.mutable_data_ptr());
    return a_hat;
  }

  // The way back for the rows that were given, onto the base if given; overwrites a_hat.
  template <class Real>
  void finish(
      const Tensor& a_hat, int64_t given, int64_t rows, int64_t blocks, Real factor,
      const void* base, const Numbers& out) const {
    const int64_t batch = rows * blocks;
    constexpr Element type = std::is_same_v<Real, double> ? Element::f64 : Element::f32;
    const bool as_it_is = out.type == type && factor == 1 && !base && given == rows &&
                          reinterpret_cast<uintptr_t>(out.data) % sizeof(Complex<Real>) == 0;
    if (as_it_is) return transform(kInverse<Real>, batch, a_hat.mutable_data_ptr(), out.data);
    const Tensor real = empty<Real>(batch * p_.b);
    transform(kInverse<Real>, batch, a_hat.mutable_data_ptr(), real.mutable_data_ptr());
    store(data<Real>(real), base, out, given * blocks * p_.b, factor, stream_);
  }

  // Y = X W^H or dX = G W, bin by bin. cuBLAS has the better product for large matrices; all chunks
  // of a call take the same.
  template <class Real>
  Tensor contract(Product which, const Tensor& a_hat, const Tensor& w_hat, int64_t rows) const {
    constexpr int64_t kLarge = 32;
    const bool forward = which == Product::forward;
    if (std::min({p_.m, p_.n, p_.tokens}) >= kLarge) {
      return torch::stable::matmul(a_hat, forward ? adjoint(w_hat) : w_hat);
    }
    const int m = static_cast<int>(p_.m), n = static_cast<int>(p_.n);
    const int64_t per_bin = p_.m * p_.n;
    const Factor a = forward ? Factor{n, 1, rows * n, false} : Factor{m, 1, rows * m, false};
    const Factor w = forward ? Factor{1, n, per_bin, true} : Factor{n, 1, per_bin, false};
    const Sizes sizes{p_.bins(), rows, forward ? m : n, forward ? n : m};
    const Tensor out_hat = complexes<Real>({sizes.bins, sizes.rows, sizes.columns});
    product<Real>(
        data<Complex<Real>>(a_hat), a, data<Complex<Real>>(w_hat), w, data<Complex<Real>>(out_hat),
        sizes, /* parts= */ 1, stream_);
    return out_hat;
  }

  // dW^ (+)= G^H X, bin by bin. Never by cuBLAS, whose sums may depend on more than the sizes.
  template <class Real>
  void accumulate(
      const Tensor& g_hat, const Tensor& x_hat, int64_t rows, bool onto, Tensor& dw_hat) const {
    const int m = static_cast<int>(p_.m), n = static_cast<int>(p_.n);
    const int64_t size = p_.bins() * p_.m * p_.n;
    const Factor g{1, m, rows * m, true}, x{n, 1, rows * n, false};
    const Sizes sizes{p_.bins(), m, n, rows};
    const int64_t parts = parts_of(sizes);
    const bool direct = parts == 1 && !onto;
    const Tensor terms = direct ? dw_hat : complexes<Real>({parts, p_.bins(), p_.m, p_.n});
    product<Real>(
        data<Complex<Real>>(g_hat), g, data<Complex<Real>>(x_hat), x, data<Complex<Real>>(terms),
        sizes, parts, stream_);
    if (direct) return;
    sum_parts<Real>(
        data<Complex<Real>>(terms), data<Complex<Real>>(dw_hat), size, parts, onto, stream_);
  }

  void transform(cufftType type, int64_t batch, void* in, void* out) const {
    const auto plan = controls.plans().get({device_.index, p_.b, batch, type}, stream_);
    const auto bytes = static_cast<int64_t>(plan->workspace_bytes());
    const Tensor workspace = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    plan->execute(in, out, workspace.mutable_data_ptr(), stream_);
  }

  template <class Real>
  Tensor empty(int64_t size) const {
    constexpr bool wide = std::is_same_v<Real, double>;
    return torch::stable::new_empty(like_, {size}, wide ? ScalarType::Double : ScalarType::Float);
  }
  template <class Real>
  Tensor complexes(const std::vector<int64_t>& sizes) const {
    constexpr bool wide = std::is_same_v<Real, double>;
    return torch::stable::new_empty(
        like_, sizes, wide ? ScalarType::ComplexDouble : ScalarType::ComplexFloat);
  }

  const Problem& p_;
  const Tensor& like_;
  const Device device_;
  const cudaStream_t stream_;
};

// Calls f with a zero of the type that sums run in.
template <class F>
void with_real(ScalarType type, const F& f) {
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

void Cuda::run(
    const Problem& p, Product which, const Tensor& a, const Tensor& b, double scale,
    const Tensor* base, Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const Call call(p, a);
  const ScalarType type = compute_type({a, b, out});
  const bool kernel_grad = which == Product::kernel_grad;
  if (!kernel_grad && call.is_fused(which, type)) {
    return call.run_fused(which, a, b, scale, base, out);
  }
  with_real(type, [&](auto zero) {
    using Real = decltype(zero);
    if (kernel_grad) {
      call.run_cufft<Real>(which, a, nullptr, &b, scale, nullptr, nullptr, &out);
    } else {
      call.run_cufft<Real>(which, a, &b, nullptr, scale, base, &out, nullptr);
    }
  });
}

void Cuda::backward(
    const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
    Tensor& dw) {
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const Call call(p, g);
  const ScalarType type = compute_type({g, x, w});
  const bool fused = call.is_fused(Product::input_grad, type);
  if (fused) call.run_fused(Product::input_grad, g, w, scale, nullptr, dx);
  with_real(type, [&](auto zero) {
    call.run_cufft<decltype(zero)>(
        Product::input_grad, g, fused ? nullptr : &w, &x, scale, nullptr, &dx, &dw);
  });
}

}  // namespace c3a::cuda
