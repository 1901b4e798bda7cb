// The CPU's back end: transforms, spectral products and inverse transforms of a few tokens at a
// time, which stay in the second-level cache between the three. Instruction sets are chosen here,
// once; cpu_kernel.cpp does the arithmetic.
//
// A vector's lanes are tokens (columns of spectra are tokens, rows are blocks) or, where that fills
// them better, blocks (columns are blocks, rows are tokens). Either way a bin's product is one
// small matrix product, kernel times activations or activations times kernel.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "aten.h"
#include "cpu_kernel.h"
#include "cpu_plan.h"
#include "operators.h"

namespace c3a {
namespace cpu {

// Instruction-set levels

#if defined(__x86_64__)
extern const Level level_x86_64_v2, level_x86_64_v3, level_x86_64_v4;
#else
extern const Level level_native;
#endif

namespace {

struct Candidate {
  const char* name;
  const Level* level;  // none: ATen's transforms
  bool runs_here;
};

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  return {
      {"x86-64-v4", &level_x86_64_v4, __builtin_cpu_supports("x86-64-v4") != 0},
      {"x86-64-v3", &level_x86_64_v3, __builtin_cpu_supports("x86-64-v3") != 0},
      {"x86-64-v2", &level_x86_64_v2, __builtin_cpu_supports("x86-64-v2") != 0},
      {"aten", nullptr, true}};
#elif defined(__aarch64__)
  return {{"aarch64", &level_native, true}, {"aten", nullptr, true}};
#else
  return {{"generic", &level_native, true}, {"aten", nullptr, true}};
#endif
}

// The level in use: the highest that runs here, or the one that C3A_CPU_LEVEL names.
const Candidate& in_use() {
  static const Candidate chosen = [] {
    const char* forced = std::getenv("C3A_CPU_LEVEL");
    std::string names;
    for (const Candidate& candidate : candidates()) {
      if (!candidate.runs_here) continue;
      if (!forced || candidate.name == std::string(forced)) return candidate;
      names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    }
    throw std::runtime_error(
        "c3a: expected C3A_CPU_LEVEL to be one of this machine's levels (" + names + "), got '" +
        forced + "'");
  }();
  return chosen;
}

template <class T>
const Kernel<T>& kernel();
template <>
const Kernel<float>& kernel() {
  return in_use().level->f32;
}
template <>
const Kernel<double>& kernel() {
  return in_use().level->f64;
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

int64_t size_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A tensor of (rows, blocks * b) numbers, as signals by row and block.
struct Blocked {
  char* data;
  ScalarType type;
  int64_t row, block;

  Blocked(const Tensor& t, int64_t blocks, int64_t b)
      : data(static_cast<char*>(t.data_ptr())), type(t.scalar_type()), row(blocks * b), block(b) {}

  char* at(int64_t r, int64_t i) const { return data + (r * row + i * block) * size_of(type); }
  Range range(int64_t r, int64_t count) const {
    return {at(r, 0), at(r + std::max<int64_t>(count, 0), 0)};
  }
};

enum class Lanes { tokens, blocks };

// One call's memory for each of its threads, from torch's allocator.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t threads, int64_t bytes)
      : bytes_(round_up(bytes, 64)),
        memory_(torch::stable::new_empty(like, {threads * bytes_}, ScalarType::Byte)),
        threads_(threads) {}

  // A part for the caller, each part once.
  char* take() {
    const int64_t part = next_++;
    check(part < threads_, "block_circ_conv", "torch split the work into too many parts");
    return static_cast<char*>(memory_.data_ptr()) + part * bytes_;
  }

 private:
  int64_t bytes_;
  Tensor memory_;
  int64_t threads_;
  std::atomic<int64_t> next_{0};
};

// Calls f(begin, end, part of the workspace) over [0, count), by torch's threads.
template <class F>
void parallel(
    const Tensor& like, int64_t count, int64_t grain, int64_t bytes_per_thread, const F& f) {
  const int64_t threads = std::min<int64_t>(
      torch::stable::get_num_threads(), std::max<int64_t>(1, (count + grain - 1) / grain));
  Workspace workspace(like, threads, bytes_per_thread);
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t begin, int64_t end) { f(begin, end, workspace.take()); });
}

template <class T>
class Call {
 public:
  static constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

  Call(const Problem& problem, const Plan& plan, const Tensor& like)
      : p_(problem), f_(plan.transform<T>()), k_(kernel<T>()), like_(like), lanes_(choose()) {}

  // A kernel's spectra, times scale and what the transforms leave: (slots, n, m) for the forward,
  // (slots, m, n) for the input gradient.
  Tensor spectra(const Tensor& w, Product product, double scale) const {
    const bool forward = product == Product::forward;
    const Blocked in(w, p_.m * p_.n, p_.b);
    const int64_t rows = terms_of(product), width = rows_of(product);
    const int64_t row = forward ? p_.b : p_.n * p_.b, column = forward ? p_.n * p_.b : p_.b;
    const Tensor w_hat = torch::stable::new_empty(like_, {spectra_size()}, kType);
    const Spectra<T> out = kernel_spectra(numbers(w_hat), rows, width);
    const T factor = static_cast<T>(scale) / f_.gain();
    parallel(
        like_, rows, grain(width * p_.b), sizeof(T) * f_.scratch(k_.lanes),
        [&](int64_t begin, int64_t end, char* scratch) {
          const Signals part{
              in.data + begin * row * size_of(in.type), element(in.type), row, column};
          const Spectra<T> to{out.data + begin * out.row, out.slot, out.row, out.width};
          Ahead nothing{};
          k_.analyse(
              f_, part, end - begin, width, factor, to, reinterpret_cast<T*>(scratch), nothing);
        });
    return w_hat;
  }

  // numbers that `spectra` returns: a last vector may be read beyond the end, into the room for
  // samples
  int64_t spectra_size() const { return f_.slots() * 2 * p_.m * p_.n + kSamples; }

  // Numbers spread over the kernel, behind its spectra where those are kept, by which a kernel is
  // known again.
  static constexpr int64_t kSamples = 64;
  static void sample(const Tensor& w, T* samples) {
    const int64_t count = w.numel();
    const auto read = [&](const auto* from) {
      for (int64_t s = 0; s < kSamples; ++s) {
        samples[s] = static_cast<T>(from[s * (count - 1) / (kSamples - 1)]);
      }
    };
    switch (w.scalar_type()) {
      case ScalarType::Double: return read(static_cast<const double*>(w.data_ptr()));
      case ScalarType::Float: return read(static_cast<const float*>(w.data_ptr()));
      default: return read(static_cast<const uint16_t*>(w.data_ptr()));  // their bits
    }
  }
  T* samples_of(const Tensor& w_hat) const { return numbers(w_hat) + spectra_size() - kSamples; }
  bool is_of(const Tensor& w_hat, const Tensor& w) const {
    T now[kSamples];
    sample(w, now);
    return std::memcmp(now, samples_of(w_hat), sizeof(now)) == 0;
  }

  // out = base + a w, or its transpose
  void apply(
      Product product, const Tensor& a, const Tensor& w_hat, const Tensor* base,
      const Tensor& out) const {
    const int64_t terms = terms_of(product), rows = rows_of(product);
    const Blocked in(a, terms, p_.b), to(out, rows, p_.b);
    const int64_t tile = tile_tokens(2 * kTileBytes, 2);
    const int64_t in_size = slab_size(terms, tile), out_size = slab_size(rows, tile);
    parallel(
        like_, (p_.tokens + tile - 1) / tile, grain(tile * (terms + rows) * p_.b),
        sizeof(T) * (in_size + out_size + f_.scratch(k_.lanes)),
        [&](int64_t begin, int64_t end, char* memory) {
          T* scratch = reinterpret_cast<T*>(memory);
          T* in_slab = scratch + f_.scratch(k_.lanes);
          const int64_t last = std::min(end * tile, p_.tokens);
          for (int64_t t = begin * tile; t < last; t += tile) {
            const int64_t count = std::min(tile, last - t);
            const Spectra<T> a_hat = slab(in_slab, terms, count);
            const Spectra<T> out_hat = slab(in_slab + in_size, rows, count);
            Ahead ahead{to.range(t, count), in.range(t + tile, std::min(tile, last - t - tile))};
            transform(in, t, count, terms, a_hat, scratch, ahead);
            multiply(product, count, a_hat, w_hat, out_hat, ahead);
            transform_back(out_hat, t, count, rows, to, base, scratch, ahead);
          }
        });
  }

  // dw, and dx if it is given: then with the spectra of w
  void backward(
      const Tensor& g, const Tensor& x, const Tensor* w_hat, double scale, Tensor* dx,
      const Tensor& dw) const {
    const Blocked in_g(g, p_.m, p_.b), in_x(x, p_.n, p_.b);
    const int64_t tile = tile_tokens((lanes_ == Lanes::blocks ? 2 : 4) * kTileBytes, 8);
    const int64_t tiles = (p_.tokens + tile - 1) / tile;
    const int64_t g_size = slab_size(p_.m, tile), x_size = slab_size(p_.n, tile);
    const int64_t width = lanes_ == Lanes::blocks ? round_up(p_.n, k_.lanes) : p_.n;
    const int64_t size = f_.slots() * p_.m * 2 * width;
    // Parts of the tokens are summed apart, then in order. Their number depends on the shape alone,
    // and so does the result.
    const int64_t most = std::max<int64_t>(1, 8 * 1024 * 1024 / (size * sizeof(T)));
    const int64_t parts = std::max<int64_t>(1, std::min({p_.tokens / 256, most, int64_t{16}}));
    const Tensor sums = torch::stable::new_empty(like_, {parts * size}, kType);
    T* sum = numbers(sums);
    const auto spectra_of_part = [&](int64_t part) {
      return Spectra<T>{sum + part * size, p_.m * 2 * width, 2 * width, width};
    };
    parallel(
        like_, parts, grain(p_.tokens * (p_.m + p_.n) * p_.b / parts),
        sizeof(T) * (g_size + x_size + f_.scratch(k_.lanes)),
        [&](int64_t begin, int64_t end, char* memory) {
          T* scratch = reinterpret_cast<T*>(memory);
          T* g_slab = scratch + f_.scratch(k_.lanes);
          T* x_slab = g_slab + g_size;
          for (int64_t part = begin; part < end; ++part) {
            const int64_t first = part * tiles / parts, last = (part + 1) * tiles / parts;
            for (int64_t i = first; i < last; ++i) {
              const int64_t t = i * tile, count = std::min(tile, p_.tokens - t);
              const Spectra<T> g_hat = slab(g_slab, p_.m, count);
              const Spectra<T> x_hat = slab(x_slab, p_.n, count);
              Ahead ahead{{}, in_x.range(t, count)};
              if (dx) ahead.soon = Blocked(*dx, p_.n, p_.b).range(t, count);
              transform(in_g, t, count, p_.m, g_hat, scratch, ahead);
              if (dx) {
                multiply(Product::input_grad, count, g_hat, *w_hat, x_hat, ahead);
                transform_back(
                    x_hat, t, count, p_.n, Blocked(*dx, p_.n, p_.b), nullptr, scratch, ahead);
              }
              if (i + 1 < last)
                ahead = {in_g.range(t + tile, std::min(tile, p_.tokens - t - tile)), {}};
              transform(in_x, t, count, p_.n, x_hat, scratch, ahead);
              accumulate(count, g_hat, x_hat, spectra_of_part(part), i != first, ahead);
            }
          }
        });
    const T factor = static_cast<T>(scale) / f_.gain();
    torch::stable::parallel_for(0, size, grain(parts), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        T total = sum[e];
        for (int64_t part = 1; part < parts; ++part) total += sum[part * size + e];
        sum[e] = total * factor;
      }
    });
    const Blocked out(dw, p_.m * p_.n, p_.b);
    const Spectra<T> total = spectra_of_part(0);
    parallel(
        like_, p_.m, grain(p_.n * p_.b), sizeof(T) * f_.scratch(k_.lanes),
        [&](int64_t begin, int64_t end, char* scratch) {
          const Results to{out.at(0, begin * p_.n), nullptr, element(out.type), p_.n * p_.b, p_.b};
          const Spectra<T> from{total.data + begin * total.row, total.slot, total.row, width};
          Ahead nothing{};
          k_.synthesise(f_, from, end - begin, p_.n, to, reinterpret_cast<T*>(scratch), nothing);
        });
  }

 private:
  // The spectra of a tile of tokens, on both sides of a product: a share of a second-level cache
  // that leaves room for the kernel's spectra and the tiles that are on their way.
  static constexpr int64_t kTileBytes = 128 * 1024;

  // Blocks that the forward or the input gradient sums over, and blocks of its result.
  int64_t terms_of(Product product) const { return product == Product::forward ? p_.n : p_.m; }
  int64_t rows_of(Product product) const { return product == Product::forward ? p_.m : p_.n; }

  // The way that fills lanes better.
  Lanes choose() const {
    const auto filled = [&](int64_t count) {
      return static_cast<double>(count) / static_cast<double>(round_up(count, k_.lanes));
    };
    const double blocks = (p_.m * filled(p_.m) + p_.n * filled(p_.n)) / (p_.m + p_.n);
    return blocks >= 0.95 * filled(p_.tokens) ? Lanes::blocks : Lanes::tokens;
  }

  // Tokens whose spectra, of activations on both sides, take at most `bytes`: up to `vectors`
  // vectors of them, or at least one vector (or token).
  int64_t tile_tokens(int64_t bytes, int64_t vectors) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const int64_t blocks =
        by_blocks ? round_up(p_.m, k_.lanes) + round_up(p_.n, k_.lanes) : p_.m + p_.n;
    const int64_t unit = by_blocks ? 1 : k_.lanes;
    const int64_t fit = bytes / (blocks * p_.b * unit * static_cast<int64_t>(sizeof(T)));
    return unit * std::clamp<int64_t>(fit, 1, by_blocks ? 64 : vectors);
  }

  // The spectra of `tokens` tokens of so many blocks.
  Spectra<T> slab(T* data, int64_t blocks, int64_t tokens) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const int64_t width = round_up(by_blocks ? blocks : tokens, k_.lanes);
    const int64_t rows = by_blocks ? tokens : blocks;
    // Slots a multiple of 4096 bytes apart would all fall into the same few lines of a cache.
    const int64_t size = rows * 2 * width;
    const int64_t pad = size * static_cast<int64_t>(sizeof(T)) % 4096 == 0 ? 2 * k_.lanes : 0;
    return {data, size + pad, 2 * width, width};
  }
  int64_t slab_size(int64_t blocks, int64_t tokens) const {
    const Spectra<T> all = slab(nullptr, blocks, tokens);
    return f_.slots() * (all.slot + 2 * k_.lanes);
  }

  // Units of `work` numbers that are worth a thread.
  static int64_t grain(int64_t work) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  }

  static Spectra<T> kernel_spectra(T* data, int64_t rows, int64_t width) {
    return {data, rows * 2 * width, 2 * width, width};
  }
  static T* numbers(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

  void transform(
      const Blocked& a, int64_t t, int64_t count, int64_t blocks, const Spectra<T>& out, T* scratch,
      Ahead& ahead) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const Signals in{
        a.at(t, 0), element(a.type), by_blocks ? a.row : a.block, by_blocks ? a.block : a.row};
    k_.analyse(
        f_, in, by_blocks ? count : blocks, by_blocks ? blocks : count, T{1}, out, scratch, ahead);
  }

  void transform_back(
      const Spectra<T>& in, int64_t t, int64_t count, int64_t blocks, const Blocked& out,
      const Tensor* base, T* scratch, Ahead& ahead) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const Results to{
        out.at(t, 0), base ? Blocked(*base, blocks, p_.b).at(t, 0) : nullptr, element(out.type),
        by_blocks ? out.row : out.block, by_blocks ? out.block : out.row};
    k_.synthesise(
        f_, in, by_blocks ? count : blocks, by_blocks ? blocks : count, to, scratch, ahead);
  }

  // y^ = conj(w^) x^ over blocks, or dx^ = transpose(w^) g^
  void multiply(
      Product product, int64_t count, const Spectra<T>& a, const Tensor& w_hat,
      const Spectra<T>& out, Ahead& ahead) const {
    const bool forward = product == Product::forward;
    const int64_t terms = terms_of(product), rows = rows_of(product);
    const Spectra<T> w = kernel_spectra(numbers(w_hat), terms, rows);
    const Matrix<const T> activations{a.data, a.slot, a.row, 1, a.width};
    const Matrix<T> result{out.data, out.slot, out.row, 1, out.width};
    if (lanes_ == Lanes::blocks) {
      const Matrix<const T> weights{w.data, w.slot, w.row, 1, w.width};
      k_.multiply(
          {f_.slots(), count, terms, rows, activations, weights, result,
           forward ? Weights::right_conjugate : Weights::right, /* accumulate= */ false},
          ahead);
    } else {
      const Matrix<const T> weights{w.data, w.slot, 1, w.row, w.width};
      k_.multiply(
          {f_.slots(), rows, terms, count, weights, activations, result,
           forward ? Weights::left_conjugate : Weights::left, /* accumulate= */ false},
          ahead);
    }
  }

  // dw^ (+)= sum over tokens of conj(g^) x^
  void accumulate(
      int64_t count, const Spectra<T>& g, const Spectra<T>& x, const Spectra<T>& dw, bool onto,
      Ahead& ahead) const {
    if (lanes_ == Lanes::tokens) {
      return k_.correlate(f_.slots(), p_.m, p_.n, count, g, x, dw, onto);
    }
    const Matrix<const T> left{g.data, g.slot, 1, g.row, g.width};
    const Matrix<const T> right{x.data, x.slot, x.row, 1, x.width};
    const Matrix<T> result{dw.data, dw.slot, dw.row, 1, dw.width};
    k_.multiply(
        {f_.slots(), p_.m, count, p_.n, left, right, result, Weights::left_conjugate, onto}, ahead);
  }

  const Problem& p_;
  const Transform<T>& f_;
  const Kernel<T>& k_;
  const Tensor& like_;
  Lanes lanes_;
};

// An operand of a call that computes in T: doubles, or whatever floats are read from.
template <class T>
Tensor as(const Tensor& t) {
  return Call<T>::kType == ScalarType::Double ? torch::stable::to(t, ScalarType::Double) : t;
}

// f fills `out`, or where the call computes in doubles, doubles that are then rounded to it.
template <class T, class F>
void filled_in(Tensor& out, const F& f) {
  if (Call<T>::kType == ScalarType::Float || out.scalar_type() == ScalarType::Double) return f(out);
  const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
  Tensor exact = torch::stable::new_empty(out, sizes, ScalarType::Double);
  f(exact);
  torch::stable::copy_(out, exact);
}

// The plan of a problem, or none: then ATen's transforms compute.
std::shared_ptr<const Plan> plan_of(const Problem& p) {
  return in_use().level ? plan_for(p.b) : nullptr;
}

struct Cpu {
  static void run(
      const Problem& p, Product product, const Tensor& a, const Tensor& b, double scale,
      const Tensor* base, Tensor& out) {
    const auto plan = plan_of(p);
    if (!plan) return Aten::run(p, product, a, b, scale, base, out);
    const bool is_float = compute_type({a, b, out}) == ScalarType::Float;
    const auto run = is_float ? &run_in<float> : &run_in<double>;
    run(p, *plan, product, a, b, scale, base, out);
  }

  static void backward(
      const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
      Tensor& dw) {
    const auto plan = plan_of(p);
    if (!plan) return Aten::backward(p, g, x, w, scale, dx, dw);
    const bool is_float = compute_type({g, x, w}) == ScalarType::Float;
    const auto run = is_float ? &backward_in<float> : &backward_in<double>;
    run(p, *plan, g, x, w, scale, dx, dw);
  }

  // The forward or the input gradient in two steps, for callers that keep the first one's result.

  static Tensor kernel_spectra(Tensor w, ScalarType dtype, bool transposed, double scale) {
    check_kernel("_kernel_spectra", w);
    const Problem p{1, w.size(0), w.size(1), w.size(2)};
    const auto plan = plan_of(p);
    if (!plan) return torch::stable::new_empty(w, {0}, dtype);
    const Product product = transposed ? Product::input_grad : Product::forward;
    const auto run =
        dtype == ScalarType::Float ? &kernel_spectra_in<float> : &kernel_spectra_in<double>;
    return run(p, *plan, torch::stable::contiguous(w), product, scale);
  }

  static bool apply_spectra(
      Tensor out, Tensor a, Tensor w, Tensor w_hat, bool transposed, std::optional<Tensor> base) {
    const char* op = "_apply_spectra";
    const Named named{transposed ? "grad_output" : "x", a};
    const Problem p = problem_of(op, named, w, transposed ? "m" : "n");
    check_onto(op, "out", out, a, transposed ? p.in_features() : p.out_features());
    const Product product = transposed ? Product::input_grad : Product::forward;
    const auto plan = plan_of(p);
    check(plan != nullptr, op, "expected a block size with spectra, got ", p.b);
    const bool is_float = w_hat.scalar_type() == ScalarType::Float;
    const auto run = is_float ? &apply_spectra_in<float> : &apply_spectra_in<double>;
    return run(p, *plan, product, out, a, w, w_hat, base ? &*base : nullptr);
  }

 private:
  template <class T>
  static void run_in(
      const Problem& p, const Plan& plan, Product product, const Tensor& a, const Tensor& b,
      double scale, const Tensor* base, Tensor& out) {
    const Call<T> call(p, plan, a);
    if (product == Product::kernel_grad) {
      return filled_in<T>(
          out, [&](Tensor& dw) { call.backward(as<T>(a), as<T>(b), nullptr, scale, nullptr, dw); });
    }
    apply_in(call, product, a, call.spectra(as<T>(b), product, scale), base, out);
  }

  template <class T>
  static void apply_in(
      const Call<T>& call, Product product, const Tensor& a, const Tensor& w_hat,
      const Tensor* base, Tensor& out) {
    filled_in<T>(out, [&](Tensor& y) {
      const Tensor from = base ? as<T>(*base) : y;
      call.apply(product, as<T>(a), w_hat, base ? &from : nullptr, y);
    });
  }

  template <class T>
  static Tensor kernel_spectra_in(
      const Problem& p, const Plan& plan, const Tensor& w, Product product, double scale) {
    const Call<T> call(p, plan, w);
    const Tensor w_hat = call.spectra(as<T>(w), product, scale);
    call.sample(w, call.samples_of(w_hat));
    return w_hat;
  }

  template <class T>
  static bool apply_spectra_in(
      const Problem& p, const Plan& plan, Product product, Tensor& out, const Tensor& a,
      const Tensor& w, const Tensor& w_hat, const Tensor* base) {
    const Call<T> call(p, plan, a);
    const int64_t expected = call.spectra_size();
    check(
        w_hat.numel() == expected, "_apply_spectra", "expected spectra of ", expected,
        " numbers, got ", w_hat.numel());
    if (!call.is_of(w_hat, torch::stable::contiguous(w))) return false;
    if (p.tokens == 0) return true;
    const Tensor x = torch::stable::contiguous(a);
    onto(out, base, {x, w, w_hat}, [&](Tensor& y, const Tensor* from) {
      apply_in(call, product, x, w_hat, from, y);
    });
    return true;
  }

  template <class T>
  static void backward_in(
      const Problem& p, const Plan& plan, const Tensor& g, const Tensor& x, const Tensor& w,
      double scale, Tensor& dx, Tensor& dw) {
    const Call<T> call(p, plan, g);
    const Tensor w_hat = call.spectra(as<T>(w), Product::input_grad, scale);
    filled_in<T>(dx, [&](Tensor& dx_in) {
      filled_in<T>(dw, [&](Tensor& dw_in) {
        call.backward(as<T>(g), as<T>(x), &w_hat, scale, &dx_in, dw_in);
      });
    });
  }
};

}  // namespace
}  // namespace cpu
}  // namespace c3a

extern "C" __attribute__((visibility("default"))) const char* c3a_cpu_capability() {
  return c3a::cpu::in_use().name;
}

STABLE_TORCH_LIBRARY_IMPL(c3a, CPU, m) {
  c3a::Operators<c3a::cpu::Cpu>::register_all(m);
  m.impl("_kernel_spectra", TORCH_BOX(&c3a::cpu::Cpu::kernel_spectra));
  m.impl("_apply_spectra", TORCH_BOX(&c3a::cpu::Cpu::apply_spectra));
}
