// The CUDA back end. Two paths: fused (fused.cu), one launch for a tile of tokens, and cuFFT's,
// chunk by chunk: convert, transform to spectra that lie bin by bin, one complex matrix product per
// bin, transform back, add and convert. Everything is enqueued on the current stream; temporaries
// and cuFFT's workspaces come from torch's allocator. Calls with many kernels are composed of
// ATen's operators (../cpp/composed.h).

#include "cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "../cpp/composed.h"
#include "../cpp/cuda_controls.h"
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

// What C3A_CUDA_PATH, C3A_CUDA_TEMPORARY_MIB and C3A_CUDA_PLANS give, or defaults; c3a.cuda changes
// it. The library is loaded where nobody could catch an error: what is wrong with the variables is
// said at first use.
class Controls final : public CudaControls {
 public:
  Controls() {
    *c3a_cuda_controls() = this;
    try {
      plans_.set_capacity(number("C3A_CUDA_PLANS", 64));
      temporary_limit_ = number("C3A_CUDA_TEMPORARY_MIB", 256) << 20;
      const char* path = setting("C3A_CUDA_PATH");
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
  // An empty variable is as if unset.
  static const char* setting(const std::string& variable) {
    const char* text = std::getenv(variable.c_str());
    return text && *text ? text : nullptr;
  }

  static int64_t number(const std::string& variable, int64_t otherwise) {
    const char* text = setting(variable);
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
  const auto value_of = [&](cudaDeviceAttr attribute) {
    int value = 0;
    C3A_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device.index));
    return value;
  };
  const int major = value_of(cudaDevAttrComputeCapabilityMajor);
  const int minor = value_of(cudaDevAttrComputeCapabilityMinor);
  if (major * 10 + minor < 75 || !has_code()) {
    std::ostringstream message;
    message << "cuda:" << device.index << " has compute capability " << major << '.' << minor
            << ", and this build of the CUDA library has code for " << C3A_CUDA_ARCHITECTURES
            << ": use a build for that device, or the CPU";
    throw std::runtime_error(message.str());
  }
  device.multiprocessors = value_of(cudaDevAttrMultiProcessorCount);
  device.shared_bytes_per_block = value_of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A contiguous tensor from its element `first` on, to be written, or only to be read: then a tensor
// that is copied on write stays as it is.
Numbers numbers(const Tensor& t, int64_t first = 0) {
  const Element type = element_of(t);
  return {static_cast<char*>(t.mutable_data_ptr()) + first * bytes_of(type), type};
}
Numbers operand(const Tensor& t, int64_t first = 0) {
  const Element type = element_of(t);
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {data + first * bytes_of(type), type};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class Real>
bool is_aligned_to_complex(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Complex<Real>) == 0;
}

// Whether prepare() lays a kernel out for the fused path: by what every later call knows.
bool has_fused_layout(int64_t b, ScalarType type) {
  return type == ScalarType::Float && has_fused_path(b);
}

// The steps of one call, on the current device and stream.
class Steps {
 public:
  Steps(const Problem& problem, const Tensor& like)
      : p_(problem), like_(like), device_(current_device()), stream_(current_stream(like)) {}

  // The path of a convolution. In units of bytes from the device's memory, the second-level cache
  // being twice as fast: cuFFT's path moves 16 bytes more for every number in and out, and the
  // kernel's spectra once; the fused one moves the spectra through the cache for every tile. A
  // prepared kernel is laid out for the fused one, and takes it where it can.
  bool is_fused(const Convolution& c) const {
    const Path path = controls.chosen_path();
    const bool wide = compute_type({c.in, c.kernel, c.out}) == ScalarType::Double;
    if (path == Path::cufft || wide) return false;
    const Tile tile = tile_of(c.p);
    if (tile.tokens == 0) return false;
    if (path == Path::fused || c.form == Form::prepared) return true;
    const int64_t spectra = 4 * c.p.m * c.p.n * c.p.b;
    const int64_t tiles = (c.p.tokens + tile.tokens - 1) / tile.tokens;
    return tiles * (spectra / 2) <=
           c.p.tokens * 16 * (c.p.in_features() + c.p.out_features()) + spectra;
  }

  void convolve_fused(const Convolution& c) const {
    Tensor w_hat = like_;
    if (c.form == Form::prepared) {
      w_hat = readable(c.kernel);
    } else {
      w_hat = empty<float>(c.p.m * c.p.n * c.p.b);
      const bool transposed = c.form == Form::transposed;
      const Problem kernel = transposed ? c.p.transposed() : c.p;
      prepare_fused(
          {{1, kernel.m, kernel.n, kernel.b},
           c.kernel,
           w_hat.scalar_type(),
           transposed,
           c.scale,
           w_hat});
    }
    const Fused problem{
        .b = c.p.b,
        .tokens = c.p.tokens,
        .in_blocks = c.p.n,
        .out_blocks = c.p.m,
        .in = operand(c.in),
        .out = numbers(c.out),
        .base = c.base ? operand(*c.base).data : nullptr,
        .w_hat = read<float2>(w_hat)};
    fused(problem, tile_of(c.p), device_, stream_);
  }

  // Many kernels, by ATen's operators. Prepared ones have the inverse transform's factor.
  void convolve_many(const Convolution& c) const {
    if (c.form != Form::prepared) return composed::convolve_many_kernels(c);
    const Tensor w_hat = readable(c.kernel);
    if (!has_fused_layout(c.p.b, w_hat.scalar_type())) {
      return composed::convolve_many_prepared(c, composed::kNoScaling);
    }
    const int64_t blocks = c.p.m * c.p.n;
    const Tensor every = composed::by_kernel(w_hat, blocks * c.p.b);
    composed::convolve_many(c, composed::kNoScaling, [&](const Tensor& kernels) {
      const Tensor slots = call_aten("aten::index_select", every, int64_t{0}, kernels);
      const int64_t all = kernels.size(0) * blocks;
      const Tensor bins = complexes<float>({c.p.bins(), all});
      bins_of_slots(c.p.b, all, read<float2>(slots), data<float2>(bins), stream_);
      return bins;
    });
  }

  void prepare_fused(const Preparation& c) const {
    const auto [count, m, n, b] = c.kernels;
    const KernelSpectra problem{
        .b = b,
        .kernels = static_cast<unsigned>(count),
        .m = static_cast<unsigned>(m),
        .n = static_cast<unsigned>(n),
        .transposed = c.transposed,
        .factor = static_cast<float>(c.scale) * fused_factor(b),
        .in = operand(c.w),
        .out = data<float2>(c.out),
        .stride = c.out.numel() / count / 2};
    kernel_spectra(problem, device_, stream_);
  }

  // By cuFFT, sums in Real.
  template <class Real>
  void convolve_by_cufft(const Convolution& c) const {
    const Tensor w_hat = kernel_bins<Real>(c);
    for_chunks<Real>([&](const Chunk& chunk) {
      const Tensor in_hat = activations<Real>(c.in, c.p.n, chunk);
      convolve_chunk<Real>(c, chunk, in_hat, w_hat);
    });
  }

  // The kernel's gradient, and the input's if given, which takes the same spectra.
  template <class Real>
  void gradients_by_cufft(const Gradients& c, const Convolution* input) const {
    Tensor w_hat = like_;
    if (input) w_hat = kernel_bins<Real>(*input);
    const Tensor dw_hat = complexes<Real>({p_.bins(), p_.m, p_.n});
    for_chunks<Real>([&](const Chunk& chunk) {
      const Tensor g_hat = activations<Real>(c.g, p_.m, chunk);
      if (input) convolve_chunk<Real>(*input, chunk, g_hat, w_hat);
      const Tensor x_hat = activations<Real>(c.x, p_.n, chunk);
      accumulate<Real>(g_hat, x_hat, chunk, dw_hat);
    });
    finish<Real>(dw_hat, p_.m, p_.m, p_.n, kernel_factor<Real>(c.scale), nullptr, numbers(c.dw));
  }

  // One kernel at a time, by the plan and to the bits of a call that is not prepared.
  template <class Real>
  void prepare_by_cufft(const Preparation& c) const {
    const Problem result = c.transposed ? p_.transposed() : p_;
    for (int64_t kernel = 0; kernel < c.kernels.count; ++kernel) {
      const Numbers w = operand(c.w, kernel * p_.m * p_.n * p_.b);
      const Tensor w_hat = spectra<Real>(w, p_.m, p_.m, p_.n, kernel_factor<Real>(c.scale));
      Tensor to = prepared_bins(result, c.out, kernel);
      torch::stable::copy_(to, c.transposed ? adjoint(w_hat) : w_hat);
    }
  }

 private:
  // Tokens that are done at once, and the rows that are transformed for them.
  struct Chunk {
    int64_t first, tokens, rows;
  };

  Tile tile_of(const Problem& p) const {
    return fused_tile(p.b, p.n, device_.shared_bytes_per_block);
  }

  template <class Real>
  Real kernel_factor(double scale) const {
    return static_cast<Real>(scale / static_cast<double>(p_.b));
  }

  template <class Real, class F>
  void for_chunks(const F& f) const {
    const int64_t size = chunk<Real>();
    for (int64_t first = 0; first < p_.tokens; first += size) {
      const int64_t tokens = std::min(size, p_.tokens - first);
      f(Chunk{first, tokens, planned(tokens)});
    }
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

  // A kernel's spectra bin by bin: (bins, m, n), or (bins, n, m) of the other direction's kernel.
  template <class Real>
  Tensor kernel_bins(const Convolution& c) const {
    if (c.form != Form::prepared) {
      const Problem kernel = c.form == Form::transposed ? c.p.transposed() : c.p;
      return spectra<Real>(
          operand(c.kernel), kernel.m, kernel.m, kernel.n, kernel_factor<Real>(c.scale));
    }
    const Tensor w_hat = readable(c.kernel);
    if constexpr (std::is_same_v<Real, float>) {
      if (has_fused_layout(c.p.b, w_hat.scalar_type())) {
        const Tensor bins = complexes<float>({c.p.bins(), c.p.m, c.p.n});
        bins_of_slots(c.p.b, c.p.m * c.p.n, read<float2>(w_hat), data<float2>(bins), stream_);
        return bins;
      }
    }
    return prepared_bins(c.p, w_hat, 0);
  }

  template <class Real>
  Tensor activations(const Tensor& a, int64_t blocks, const Chunk& chunk) const {
    const Numbers first = operand(a, chunk.first * blocks * p_.b);
    return spectra<Real>(first, chunk.tokens, chunk.rows, blocks, Real{1});
  }

  // What is left to do with a chunk's spectra.
  template <class Real>
  void convolve_chunk(
      const Convolution& c, const Chunk& chunk, const Tensor& in_hat, const Tensor& w_hat) const {
    const Tensor out_hat = contract<Real>(c, in_hat, w_hat, chunk.rows);
    const int64_t begin = chunk.first * c.p.out_features();
    finish<Real>(
        out_hat, chunk.tokens, chunk.rows, c.p.m, Real{1},
        c.base ? operand(*c.base, begin).data : nullptr, numbers(c.out, begin));
  }

  // given * blocks * b numbers times a factor, and zeros for more rows -> (bins, rows, blocks)
  template <class Real>
  Tensor spectra(const Numbers& a, int64_t given, int64_t rows, int64_t blocks, Real factor) const {
    const int64_t batch = rows * blocks;
    constexpr Element type = std::is_same_v<Real, double> ? Element::f64 : Element::f32;
    // cuFFT wants real numbers aligned to complex ones.
    const bool as_it_is =
        a.type == type && factor == 1 && given == rows && is_aligned_to_complex<Real>(a.data);
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
                          is_aligned_to_complex<Real>(out.data);
    if (as_it_is) return transform(kInverse<Real>, batch, a_hat.mutable_data_ptr(), out.data);
    const Tensor real = empty<Real>(batch * p_.b);
    transform(kInverse<Real>, batch, a_hat.mutable_data_ptr(), real.mutable_data_ptr());
    store(read<Real>(real), base, out, given * blocks * p_.b, factor, stream_);
  }

  // Y = X W^H, or G W for the other direction's kernel, bin by bin. cuBLAS has the better product
  // for large matrices; all chunks of a call take the same.
  template <class Real>
  Tensor contract(
      const Convolution& c, const Tensor& in_hat, const Tensor& w_hat, int64_t rows) const {
    constexpr int64_t kLarge = 32;
    const bool transposed = c.form == Form::transposed;
    if (std::min({c.p.m, c.p.n, c.p.tokens}) >= kLarge) {
      return torch::stable::matmul(in_hat, transposed ? w_hat : adjoint(w_hat));
    }
    const int in = static_cast<int>(c.p.n), out = static_cast<int>(c.p.m);
    const int64_t per_bin = c.p.m * c.p.n;
    const Factor a{in, 1, rows * in, false};
    const Factor w = transposed ? Factor{out, 1, per_bin, false} : Factor{1, in, per_bin, true};
    const Sizes sizes{c.p.bins(), rows, out, in};
    const Tensor out_hat = complexes<Real>({sizes.bins, sizes.rows, sizes.columns});
    product<Real>(
        read<Complex<Real>>(in_hat), a, read<Complex<Real>>(w_hat), w, data<Complex<Real>>(out_hat),
        sizes, /* parts= */ 1, stream_);
    return out_hat;
  }

  // dW^ (+)= G^H X, bin by bin. Never by cuBLAS, whose sums may depend on more than the sizes.
  template <class Real>
  void accumulate(
      const Tensor& g_hat, const Tensor& x_hat, const Chunk& chunk, const Tensor& dw_hat) const {
    const int m = static_cast<int>(p_.m), n = static_cast<int>(p_.n);
    const int64_t size = p_.bins() * p_.m * p_.n;
    const Factor g{1, m, chunk.rows * m, true}, x{n, 1, chunk.rows * n, false};
    const Sizes sizes{p_.bins(), m, n, chunk.rows};
    const bool later = chunk.first > 0;
    const int64_t parts = parts_of(sizes);
    const bool direct = parts == 1 && !later;
    const Tensor terms = direct ? dw_hat : complexes<Real>({parts, p_.bins(), p_.m, p_.n});
    product<Real>(
        read<Complex<Real>>(g_hat), g, read<Complex<Real>>(x_hat), x, data<Complex<Real>>(terms),
        sizes, parts, stream_);
    if (direct) return;
    sum_parts<Real>(
        read<Complex<Real>>(terms), data<Complex<Real>>(dw_hat), size, parts, later, stream_);
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

  const Problem p_;
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

void Cuda::convolve(const Convolution& c) {
  const torch::stable::accelerator::DeviceGuard guard(c.in.get_device_index());
  const Steps steps(c.p, c.in);
  if (c.index) return steps.convolve_many(c);
  if (steps.is_fused(c)) return steps.convolve_fused(c);
  with_real(compute_type({c.in, c.kernel, c.out}), [&](auto zero) {
    steps.convolve_by_cufft<decltype(zero)>(c);
  });
}

void Cuda::gradients(const Gradients& c) {
  const torch::stable::accelerator::DeviceGuard guard(c.g.get_device_index());
  if (c.index) return composed::gradients_of_many(c);
  const Steps steps(c.p, c.g);
  const auto by_cufft = [&](const Convolution* input) {
    with_real(compute_type({c.g, c.x, c.dw, c.dx ? *c.dx : c.dw}), [&](auto zero) {
      steps.gradients_by_cufft<decltype(zero)>(c, input);
    });
  };
  if (!c.dx) return by_cufft(nullptr);
  const Convolution input{"block_circ_conv_backward",
                          c.p.transposed(),
                          Form::transposed,
                          *c.w,
                          c.scale,
                          c.g,
                          c.base,
                          *c.dx};
  const bool fused = steps.is_fused(input);
  if (fused) steps.convolve_fused(input);
  by_cufft(fused ? nullptr : &input);
}

void Cuda::prepare(const Preparation& c) {
  const torch::stable::accelerator::DeviceGuard guard(c.w.get_device_index());
  const auto [count, m, n, b] = c.kernels;
  const Steps steps({count, m, n, b}, c.w);
  const ScalarType type = c.out.scalar_type();
  if (has_fused_layout(b, type)) return steps.prepare_fused(c);
  with_real(type, [&](auto zero) { steps.prepare_by_cufft<decltype(zero)>(c); });
}

}  // namespace c3a::cuda
