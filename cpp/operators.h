// The front end, the same for every device: checks, allocates, folds leading dimensions, and hands
// contiguous tensors to a back end. A back end is a struct with
//
//   static void convolve(const Convolution&);    // forward, input gradient, prepared or not
//   static void gradients(const Gradients&);     // kernel gradient, and the input's with it
//   static void prepare(const Preparation&);     // kernels' spectra, for later convolutions
//   // Refuse what prepare() did not make, as far as its numbers tell; `transposed` may be null.
//   static void check_prepared(
//       const char* op, const Problem&, const Tensor& w_hat, const Tensor* transposed,
//       const Tensor* index);
//
// that fill their results. Operands and results may differ in dtype; sums run in compute_type().

#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "namespace.h"
#include "problem.h"

namespace c3a {

// The back end's part of an operator: contiguous tensors, tokens >= 1. With an `index` (rows,) a
// kernel is a stack of them along a first dimension, and tokens are rows of tokens / rows, of which
// row r takes kernel index[r], or none where that is -1. The index is on the CPU or on the tensors'
// device. With spectra X, G over
// (tokens, blocks) and W over (m, n), one per frequency bin, the products are
//
//   forward         Y  = X W^H
//   input gradient  dX = G W, the forward of the transposed matrix, whose spectra are conj(W)^T
//   kernel gradient dW = G^H X

enum class Form { kernel, transposed, prepared };

// out = base + scale * (in times a block-circulant matrix)
struct Convolution {
  const char* op;
  Problem p;             // in: (tokens, n*b), out: (tokens, m*b)
  Form form;             // of `kernel`:
  const Tensor& kernel;  // w (m, n, b), the other direction's w (n, m, b), or what prepare() filled
  double scale;          // 1 if prepared, which has it already
  const Tensor& in;
  const Tensor* base;  // of out's shape and dtype, or none; may be `out`
  Tensor& out;
  const Tensor* index = nullptr;
};

// dw = scale * g^T x by blocks, and dx = base + scale * (g times the transposed matrix of w) where
// asked for
struct Gradients {
  Problem p;
  const Tensor& g;
  const Tensor& x;
  double scale;
  Tensor& dw;
  const Tensor* w = nullptr;  // with dx
  Tensor* dx = nullptr;
  const Tensor* base = nullptr;   // of dx's shape and dtype, or none; may be `dx`
  const Tensor* index = nullptr;  // without dx
};

// out: the spectra, times scale, of kernels (m, n, b) or their transposed ones; as many tensors of
// prepared_length() numbers a block, zeros at first. Their layout is the back end's. `dtype` is
// what they are for: bfloat16, where a back end may round them, or that of out.
struct Preparation {
  Kernels kernels;
  const Tensor& w;
  ScalarType dtype;
  bool transposed;
  double scale;
  Tensor& out;
};

template <class Backend>
struct Operators {
  static Tensor block_circ_conv(Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv";
    return named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n");
      return convolved(op, p, Form::kernel, w, scale, x);
    });
  }

  static Tensor add(Tensor base, Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv_add";
    return named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n");
      return added(op, p, Form::kernel, w, scale, x, base);
    });
  }

  static void add_(Tensor base, Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv_add_";
    named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n");
      add_in_place(op, p, Form::kernel, w, scale, x, base);
    });
  }

  static Tensor linear(
      Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor w, double scale) {
    const char* op = "block_circ_conv_linear";
    return named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n");
      check_linear(op, p, x, weight, bias);
      Tensor y =
          call_aten("aten::linear", torch::stable::to(x, weight.scalar_type()), weight, bias);
      add_in_place(op, p, Form::kernel, w, scale, x, y);
      return y;
    });
  }

  static Tensor input_grad(Tensor g, Tensor w, double scale) {
    const char* op = "block_circ_conv_input_grad";
    return named(op, [&] {
      const Problem p = problem_of(op, {"grad_output", g}, w, "m").transposed();
      return convolved(op, p, Form::transposed, w, scale, g);
    });
  }

  static Tensor kernel_grad(
      Tensor g, Tensor x, int64_t b, std::optional<ScalarType> dtype, double scale) {
    const char* op = "block_circ_conv_kernel_grad";
    return named(op, [&] {
      const Problem p = problem_of(op, g, x, b);
      return kernel_grad_of(op, p, {p.m, p.n, p.b}, g, x, dtype, scale, nullptr);
    });
  }

  static std::tuple<Tensor, Tensor> backward(Tensor g, Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv_backward";
    return named(op, [&]() -> std::tuple<Tensor, Tensor> {
      const Problem p = problem_of_pair(op, g, x, w);
      Tensor dx = torch::stable::new_empty(x, sizes(x, p.in_features()));
      return {dx, both(p, g, x, w, scale, dx, nullptr)};
    });
  }

  static Tensor backward_add_(Tensor dx, Tensor g, Tensor x, Tensor w, double scale) {
    const char* op = "block_circ_conv_backward_add_";
    return named(op, [&] {
      const Problem p = problem_of_pair(op, g, x, w);
      check_base(op, {"grad_input", dx}, x, p.in_features());
      check_writable(op, {"grad_input", dx});
      const Tensor from = contiguous(dx);
      if (dx.is_contiguous() && !meet(dx, g) && !meet(dx, x) && !meet(dx, w)) {
        return both(p, g, x, w, scale, dx, &from);
      }
      Tensor sum = torch::stable::new_empty(dx, sizes(dx, p.in_features()));
      const Tensor dw = both(p, g, x, w, scale, sum, &from);
      torch::stable::copy_(dx, sum);
      return dw;
    });
  }

  static Tensor prepare(Tensor w, std::optional<ScalarType> dtype, bool transposed, double scale) {
    const char* op = "prepare";
    return named(op, [&] {
      const Kernels k = kernels_of(op, w);
      const ScalarType type = dtype.value_or(compute_type({w}));
      const bool is_float = compute_type({w}) == ScalarType::Float;
      check(
          type == ScalarType::Double ||
              (is_float && (type == ScalarType::Float || type == ScalarType::BFloat16)),
          op,
          "expected dtype to be float32 or bfloat16, or float64 for kernels in float64 too, got ",
          dtype_name(static_cast<int32_t>(type)), " for w in ", dtype_name(dtype_of(w)));
      std::vector<int64_t> shape(w.sizes().begin(), w.sizes().end() - 3);
      shape.insert(
          shape.end(), {transposed ? k.n : k.m, transposed ? k.m : k.n,
                        prepared_length(k.m, k.n, k.b, w.is_cpu())});
      const ScalarType numbers = type == ScalarType::Double ? type : ScalarType::Float;
      Tensor w_hat = torch::stable::new_zeros(w, shape, numbers);
      const Tensor w_in = contiguous(w);
      if (k.count > 0) Backend::prepare({k, w_in, type, transposed, scale, w_hat});
      return w_hat;
    });
  }

  static Tensor prepared(
      Tensor x, Tensor w_hat, int64_t b, std::optional<Tensor> w_hat_transposed) {
    const char* op = "block_circ_conv_prepared";
    return named(op, [&] {
      const Problem p = prepared_problem(op, x, w_hat, b, w_hat_transposed);
      return convolved(op, p, Form::prepared, w_hat, 1, x);
    });
  }

  static Tensor prepared_add(
      Tensor base, Tensor x, Tensor w_hat, int64_t b, std::optional<Tensor> w_hat_transposed) {
    const char* op = "block_circ_conv_prepared_add";
    return named(op, [&] {
      const Problem p = prepared_problem(op, x, w_hat, b, w_hat_transposed);
      return added(op, p, Form::prepared, w_hat, 1, x, base);
    });
  }

  static void prepared_add_(
      Tensor base, Tensor x, Tensor w_hat, int64_t b, std::optional<Tensor> w_hat_transposed) {
    const char* op = "block_circ_conv_prepared_add_";
    named(op, [&] {
      const Problem p = prepared_problem(op, x, w_hat, b, w_hat_transposed);
      add_in_place(op, p, Form::prepared, w_hat, 1, x, base);
    });
  }

  static Tensor many(Tensor x, Tensor w, Tensor index, double scale) {
    const char* op = "block_circ_conv_many";
    return named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n", &index);
      return convolved(op, p, Form::kernel, w, scale, x, &index);
    });
  }

  static void many_add_(Tensor base, Tensor x, Tensor w, Tensor index, double scale) {
    const char* op = "block_circ_conv_many_add_";
    named(op, [&] {
      const Problem p = problem_of(op, {"x", x}, w, "n", &index);
      add_in_place(op, p, Form::kernel, w, scale, x, base, &index);
    });
  }

  static Tensor many_input_grad(Tensor g, Tensor w, Tensor index, double scale) {
    const char* op = "block_circ_conv_many_input_grad";
    return named(op, [&] {
      const Problem p = problem_of(op, {"grad_output", g}, w, "m", &index).transposed();
      return convolved(op, p, Form::transposed, w, scale, g, &index);
    });
  }

  static Tensor many_kernel_grad(
      Tensor g, Tensor x, Tensor index, int64_t adapters, int64_t b,
      std::optional<ScalarType> dtype, double scale) {
    const char* op = "block_circ_conv_many_kernel_grad";
    return named(op, [&] {
      const Problem p = problem_of(op, g, x, b, &index, adapters);
      return kernel_grad_of(op, p, {adapters, p.m, p.n, p.b}, g, x, dtype, scale, &index);
    });
  }

  static Tensor many_prepared(
      Tensor x, Tensor w_hat, Tensor index, int64_t b, std::optional<Tensor> w_hat_transposed) {
    const char* op = "block_circ_conv_many_prepared";
    return named(op, [&] {
      const Problem p = prepared_problem(op, x, w_hat, b, w_hat_transposed, &index);
      return convolved(op, p, Form::prepared, w_hat, 1, x, &index);
    });
  }

  static void many_prepared_add_(
      Tensor base, Tensor x, Tensor w_hat, Tensor index, int64_t b,
      std::optional<Tensor> w_hat_transposed) {
    const char* op = "block_circ_conv_many_prepared_add_";
    named(op, [&] {
      const Problem p = prepared_problem(op, x, w_hat, b, w_hat_transposed, &index);
      add_in_place(op, p, Form::prepared, w_hat, 1, x, base, &index);
    });
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("block_circ_conv", TORCH_BOX(&block_circ_conv));
    m.impl("block_circ_conv_add", TORCH_BOX(&add));
    m.impl("block_circ_conv_add_", TORCH_BOX(&add_));
    m.impl("block_circ_conv_linear", TORCH_BOX(&linear));
    m.impl("block_circ_conv_input_grad", TORCH_BOX(&input_grad));
    m.impl("block_circ_conv_kernel_grad", TORCH_BOX(&kernel_grad));
    m.impl("block_circ_conv_backward", TORCH_BOX(&backward));
    m.impl("block_circ_conv_backward_add_", TORCH_BOX(&backward_add_));
    m.impl("prepare", TORCH_BOX(&prepare));
    m.impl("block_circ_conv_prepared", TORCH_BOX(&prepared));
    m.impl("block_circ_conv_prepared_add", TORCH_BOX(&prepared_add));
    m.impl("block_circ_conv_prepared_add_", TORCH_BOX(&prepared_add_));
    m.impl("block_circ_conv_many", TORCH_BOX(&many));
    m.impl("block_circ_conv_many_add_", TORCH_BOX(&many_add_));
    m.impl("block_circ_conv_many_input_grad", TORCH_BOX(&many_input_grad));
    m.impl("block_circ_conv_many_kernel_grad", TORCH_BOX(&many_kernel_grad));
    m.impl("block_circ_conv_many_prepared", TORCH_BOX(&many_prepared));
    m.impl("block_circ_conv_many_prepared_add_", TORCH_BOX(&many_prepared_add_));
  }

 private:
  static Problem prepared_problem(
      const char* op, const Tensor& x, const Tensor& w_hat, int64_t b,
      const std::optional<Tensor>& w_hat_transposed, const Tensor* index = nullptr) {
    const Problem p = problem_of_prepared(op, x, w_hat, b, w_hat_transposed, index);
    Backend::check_prepared(op, p, w_hat, w_hat_transposed ? &*w_hat_transposed : nullptr, index);
    return p;
  }

  static Tensor kernel_grad_of(
      const char* op, const Problem& p, const std::vector<int64_t>& shape, const Tensor& g,
      const Tensor& x, std::optional<ScalarType> dtype, double scale, const Tensor* index) {
    check_supported(op, "dtype", dtype.value_or(g.scalar_type()));
    if (p.tokens == 0) return torch::stable::new_zeros(g, shape, dtype);
    Tensor dw = torch::stable::new_empty(g, shape, dtype);
    const Tensor g_in = contiguous(g), x_in = contiguous(x);
    const Tensor index_in = index ? contiguous(*index) : g_in;
    Backend::gradients(
        {.p = p,
         .g = g_in,
         .x = x_in,
         .scale = scale,
         .dw = dw,
         .index = index ? &index_in : nullptr});
    return dw;
  }

  static std::vector<int64_t> sizes(const Tensor& like, int64_t features) {
    std::vector<int64_t> s(like.sizes().begin(), like.sizes().end());
    s.back() = features;
    return s;
  }

  // Asked first, since the call takes a microsecond.
  static Tensor contiguous(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  static void fill(
      const char* op, const Problem& p, Form form, const Tensor& kernel, double scale,
      const Tensor& x, const Tensor* base, Tensor& out, const Tensor* index) {
    if (p.tokens == 0) return;
    const Tensor kernel_in = contiguous(kernel), in = contiguous(x);
    const Tensor index_in = index ? contiguous(*index) : in;
    Backend::convolve({op, p, form, kernel_in, scale, in, base, out, index ? &index_in : nullptr});
  }

  // Fills dx, onto `base` if given, and returns dw.
  static Tensor both(
      const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
      const Tensor* base) {
    if (p.tokens == 0) return torch::stable::new_zeros(w, {p.m, p.n, p.b});
    Tensor dw = torch::stable::new_empty(w, {p.m, p.n, p.b});
    const Tensor g_in = contiguous(g), x_in = contiguous(x), w_in = contiguous(w);
    Backend::gradients({p, g_in, x_in, scale, dw, &w_in, &dx, base});
    return dw;
  }

  static Tensor convolved(
      const char* op, const Problem& p, Form form, const Tensor& kernel, double scale,
      const Tensor& x, const Tensor* index = nullptr) {
    Tensor out = torch::stable::new_empty(x, sizes(x, p.out_features()));
    fill(op, p, form, kernel, scale, x, nullptr, out, index);
    return out;
  }

  static Tensor added(
      const char* op, const Problem& p, Form form, const Tensor& kernel, double scale,
      const Tensor& x, const Tensor& base, const Tensor* index = nullptr) {
    check_add(op, p, form, kernel, x, base);
    Tensor out = torch::stable::new_empty(base, sizes(base, p.out_features()));
    const Tensor from = contiguous(base);
    fill(op, p, form, kernel, scale, x, &from, out, index);
    return out;
  }

  // Writes `base` itself, or by way of a new tensor where it is not contiguous or shares memory
  // with what is read.
  static void add_in_place(
      const char* op, const Problem& p, Form form, const Tensor& kernel, double scale,
      const Tensor& x, Tensor& base, const Tensor* index = nullptr) {
    check_add(op, p, form, kernel, x, base);
    check_writable(op, {"base", base});
    if (p.tokens == 0) return;
    if (base.is_contiguous() && !meet(base, x) && !meet(base, kernel)) {
      const Tensor from = base;
      return fill(op, p, form, kernel, scale, x, &from, base, index);
    }
    torch::stable::copy_(base, added(op, p, form, kernel, scale, x, base, index));
  }

  static void check_add(
      const char* op, const Problem& p, Form form, const Tensor& kernel, const Tensor& x,
      const Tensor& base) {
    check_base(op, {"base", base}, x, p.out_features());
    check(
        form != Form::prepared || base.scalar_type() != ScalarType::Double ||
            kernel.scalar_type() == ScalarType::Double,
        op, "expected w_hat in float64, as base is: c3a.prepare(w, torch.float64)");
  }

  // Whether two tensors' memory may overlap.
  static bool meet(const Tensor& s, const Tensor& t) {
    const auto bytes = [](const Tensor& a) {
      const char* begin = static_cast<const char*>(a.data_ptr());
      int64_t last = 0;
      for (int64_t d = 0; d < a.dim(); ++d) last += (a.size(d) - 1) * a.stride(d);
      return std::pair(begin, begin + (last + 1) * a.element_size());
    };
    if (s.numel() == 0 || t.numel() == 0) return false;
    const auto [a, a_end] = bytes(s);
    const auto [b, b_end] = bytes(t);
    return a < b_end && b < a_end;
  }
};

}  // namespace c3a
