// The front end, the same for every device: checks, allocates, folds leading dimensions, and hands
// contiguous tensors to a back end. A back end is a struct with
//
//   static void run(const Problem&, Product, const Tensor& a, const Tensor& b, double scale,
//                   const Tensor* base, Tensor& out);
//   static void backward(const Problem&, const Tensor& g, const Tensor& x, const Tensor& w,
//                        double scale, Tensor& dx, Tensor& dw);
//
// that fill their results with `scale` times a product, the first onto `base` if it is given, which
// has the result's shape and dtype and may be the result. Operands and results may differ in dtype;
// tokens >= 1.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace c3a {

// With spectra X, G over (tokens, blocks) and W over (m, n), one per frequency bin:
enum class Product {
  forward,      // Y  = X W^H    a = x, b = w
  input_grad,   // dX = G W      a = g, b = w
  kernel_grad,  // dW = G^H X    a = g, b = x
};

// Calls fill(out, base) to write `out`, which may be `base`: by way of a new tensor where `out` is
// not contiguous or shares memory with what is read.
template <class F>
void onto(Tensor& out, const Tensor* base, std::initializer_list<Tensor> read, const F& fill) {
  const auto bytes = [](const Tensor& t) {
    const char* begin = static_cast<const char*>(t.data_ptr());
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return std::pair(begin, begin + (last + 1) * t.element_size());
  };
  bool apart = out.is_contiguous();
  for (const Tensor& t : read) {
    if (t.numel() == 0) continue;
    const auto [a, a_end] = bytes(out);
    const auto [b, b_end] = bytes(t);
    apart = apart && (a_end <= b || b_end <= a);
  }
  const Tensor from = base ? torch::stable::contiguous(*base) : out;
  if (apart) return fill(out, base ? &from : nullptr);
  const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
  Tensor result = torch::stable::new_empty(out, sizes);
  fill(result, base ? &from : nullptr);
  torch::stable::copy_(out, result);
}

template <class Backend>
struct Operators {
  static Tensor block_circ_conv(Tensor x, Tensor w, double scale) {
    const Problem p = problem_of("block_circ_conv", {"x", x}, w, "n");
    return over_tokens(p, Product::forward, x, w, scale, p.out_features());
  }

  static Tensor add(Tensor base, Tensor x, Tensor w, double scale) {
    const Problem p = problem_of_add("block_circ_conv_add", base, x, w);
    Tensor out = torch::stable::new_empty(base, sizes(base, p.out_features()));
    if (p.tokens == 0) return out;
    const Tensor onto = contiguous(base);
    Backend::run(p, Product::forward, contiguous(x), contiguous(w), scale, &onto, out);
    return out;
  }

  static void add_(Tensor base, Tensor x, Tensor w, double scale) {
    const Problem p = problem_of_add("block_circ_conv_add_", base, x, w);
    if (p.tokens == 0) return;
    onto(base, &base, {x, w}, [&](Tensor& out, const Tensor* from) {
      Backend::run(p, Product::forward, contiguous(x), contiguous(w), scale, from, out);
    });
  }

  static Tensor input_grad(Tensor g, Tensor w, double scale) {
    const Problem p = problem_of("block_circ_conv_input_grad", {"grad_output", g}, w, "m");
    return over_tokens(p, Product::input_grad, g, w, scale, p.in_features());
  }

  static Tensor kernel_grad(
      Tensor g, Tensor x, int64_t b, std::optional<ScalarType> dtype, double scale) {
    const char* op = "block_circ_conv_kernel_grad";
    const Problem p = problem_of(op, g, x, b);
    check_supported(op, "dtype", dtype.value_or(g.scalar_type()));
    if (p.tokens == 0) return torch::stable::new_zeros(g, {p.m, p.n, p.b}, dtype);
    Tensor dw = torch::stable::new_empty(g, {p.m, p.n, p.b}, dtype);
    Backend::run(p, Product::kernel_grad, contiguous(g), contiguous(x), scale, nullptr, dw);
    return dw;
  }

  static std::tuple<Tensor, Tensor> backward(Tensor g, Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv_backward";
    const Problem p = problem_of(op, {"x", x}, w, "n");
    problem_of(op, {"grad_output", g}, w, "m");
    check_same_device(op, {"grad_output", g}, {"x", x});
    check_same_leading(op, g, x);
    Tensor dx = torch::stable::new_empty(x, sizes(x, p.in_features()));
    if (p.tokens == 0) return {dx, torch::stable::new_zeros(w, {p.m, p.n, p.b})};
    Tensor dw = torch::stable::new_empty(w, {p.m, p.n, p.b});
    Backend::backward(p, contiguous(g), contiguous(x), contiguous(w), scale, dx, dw);
    return {dx, dw};
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("block_circ_conv", TORCH_BOX(&block_circ_conv));
    m.impl("block_circ_conv_add", TORCH_BOX(&add));
    m.impl("block_circ_conv_add_", TORCH_BOX(&add_));
    m.impl("block_circ_conv_input_grad", TORCH_BOX(&input_grad));
    m.impl("block_circ_conv_kernel_grad", TORCH_BOX(&kernel_grad));
    m.impl("block_circ_conv_backward", TORCH_BOX(&backward));
  }

 private:
  static Problem problem_of_add(
      const char* op, const Tensor& base, const Tensor& x, const Tensor& w) {
    const Problem p = problem_of(op, {"x", x}, w, "n");
    check_onto(op, "base", base, x, p.out_features());
    return p;
  }

  static std::vector<int64_t> sizes(const Tensor& like, int64_t features) {
    std::vector<int64_t> s(like.sizes().begin(), like.sizes().end());
    s.back() = features;
    return s;
  }

  static Tensor contiguous(const Tensor& t) { return torch::stable::contiguous(t); }

  static Tensor over_tokens(
      const Problem& p, Product product, const Tensor& a, const Tensor& w, double scale,
      int64_t features) {
    Tensor out = torch::stable::new_empty(a, sizes(a, features));
    if (p.tokens > 0) Backend::run(p, product, contiguous(a), contiguous(w), scale, nullptr, out);
    return out;
  }
};

}  // namespace c3a
