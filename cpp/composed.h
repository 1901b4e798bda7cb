// Steps of the back ends that compose ATen's operators:
//
//   a^ = rfft(a): (rows, blocks, b) -> (bins, rows, blocks), a product per bin, then irfft back
//
// and the whole of a call with many kernels, which the CUDA library has too. A kernel's spectra are
// (bins, m, n), complex; those of one kernel for each of some rows (bins, rows, m, n).

#pragma once

#include "operators.h"

namespace c3a::composed {

// ATen's own codes for the scaling of a transform (at::native::fft_norm_mode).
constexpr int64_t kNoScaling = 0;
constexpr int64_t kScaleByLength = 2;

using Dims = std::vector<int64_t>;

// (rows * blocks * b) numbers -> (bins, rows, blocks), complex and contiguous, which keeps the
// batched product from copying bin by bin
inline Tensor spectra(const Tensor& a, ScalarType type, int64_t rows, int64_t blocks, int64_t b) {
  const Tensor blocked = torch::stable::to(torch::stable::reshape(a, {rows, blocks, b}), type);
  const Tensor a_hat =
      call_aten("aten::_fft_r2c", blocked, Dims{2}, kNoScaling, /* onesided= */ true);
  return torch::stable::contiguous(call_aten("aten::permute", a_hat, Dims{2, 0, 1}));
}

inline Tensor scaled(const Tensor& a, double scale) {
  if (scale == 1) return a;
  const Tensor factor = torch::stable::full({}, scale, ScalarType::Double);
  return call_aten("aten::mul.Tensor", a, factor);
}

// (bins, rows, blocks), complex -> (rows, blocks, b)
inline Tensor signals(const Tensor& a_hat, int64_t b, int64_t scaling = kScaleByLength) {
  const Tensor by_row = call_aten("aten::permute", a_hat, Dims{1, 2, 0});
  return call_aten("aten::_fft_c2r", by_row, Dims{2}, scaling, b);
}

// `out` = as many numbers, onto `base` if given
inline void write(const Tensor& numbers, const Tensor* base, Tensor& out) {
  const Tensor result = torch::stable::reshape(numbers, out.sizes());
  if (!base) {
    torch::stable::copy_(out, result);
  } else {
    // The sum takes the wider of the two types.
    torch::stable::copy_(out, torch::stable::subtract(result, *base, -1));
  }
}

inline Tensor adjoint_of(const Tensor& t) { return torch::stable::contiguous(adjoint(t)); }

inline Tensor part(Tensor t, int64_t first, int64_t count) {
  return torch::stable::narrow(t, 0, first, count);
}

// The rows of a call, some at a time: what there is for each of them stays within a limit.
class Rows {
 public:
  Rows(const Tensor& index, const Tensor& like, int64_t bytes_of_a_row)
      : rows_(index.size(0)), some_(std::clamp<int64_t>(kTemporary / bytes_of_a_row, 1, rows_)) {
    const Tensor here = index.is_cpu() && !like.is_cpu()
                            ? torch::stable::to(index, like.device(), /* non_blocking= */ true)
                            : index;
    none_ = torch::stable::reshape(call_aten("aten::signbit", here), {rows_, 1});
    kernel_ = call_aten("aten::relu", here);  // any kernel where there is none
  }

  // Calls f(first, count, kernels) with the kernels of `count` rows.
  template <class F>
  void for_some(const F& f) const {
    for (int64_t first = 0; first < rows_; first += some_) {
      const int64_t count = std::min(some_, rows_ - first);
      f(first, count, part(kernel_, first, count));
    }
  }

  // Rows of numbers, with zeros where there is no kernel.
  Tensor masked(const Tensor& numbers, int64_t first, int64_t count) const {
    const Tensor rows = torch::stable::reshape(numbers, {count, -1});
    return with(torch::stable::new_zeros(rows, {1}), rows, first, count);
  }

  // Rows of numbers, with those of others of their type where there is no kernel.
  Tensor with(const Tensor& others, const Tensor& rows, int64_t first, int64_t count) const {
    return call_aten("aten::where.self", part(none_, first, count), others, rows);
  }

 private:
  static constexpr int64_t kTemporary = 64 << 20;
  int64_t rows_, some_;
  Tensor none_, kernel_;
};

inline int64_t spectrum_bytes(const Problem& p) { return p.bins() * p.m * p.n * 16; }

// The tokens of some rows.
inline Tensor some_rows(
    const Tensor& a, const Problem& p, int64_t rows, int64_t first, int64_t count) {
  return part(torch::stable::reshape(a, {rows, p.tokens / rows * a.size(-1)}), first, count);
}

// `bins_of(kernels)` makes (bins, rows, m, n) of the kernels of some rows.
template <class Bins>
void convolve_many(const Convolution& c, int64_t scaling, const Bins& bins_of) {
  const Problem& p = c.p;
  const ScalarType type = compute_type({c.in, c.kernel, c.out});
  const int64_t rows = c.index->size(0), each = p.tokens / rows;
  const Rows by_row(*c.index, c.in, spectrum_bytes(p));
  by_row.for_some([&](int64_t first, int64_t count, const Tensor& kernels) {
    const Tensor w_hat = torch::stable::reshape(bins_of(kernels), {p.bins() * count, p.m, p.n});
    const Tensor in = some_rows(c.in, p, rows, first, count);
    const Tensor in_hat = torch::stable::reshape(
        spectra(in, type, count * each, p.n, p.b), {p.bins() * count, each, p.n});
    const Tensor out_hat = torch::stable::reshape(
        torch::stable::matmul(in_hat, adjoint_of(w_hat)), {p.bins(), count * each, p.m});
    const Tensor numbers = signals(out_hat, p.b, scaling);
    Tensor out = some_rows(c.out, p, rows, first, count);
    if (!c.base) {
      write(by_row.masked(numbers, first, count), nullptr, out);
    } else {  // a sum with zeros would lose subnormal numbers and the sign of zeros
      const Tensor base = some_rows(*c.base, p, rows, first, count);
      Tensor sum = torch::stable::new_empty(out, out.sizes());
      write(numbers, &base, sum);
      torch::stable::copy_(out, by_row.with(base, sum, first, count));
    }
  });
}

// Kernels as they are, (adapters, m, n, b), or (adapters, n, m, b) of the transposed matrices.
inline void convolve_many_kernels(const Convolution& c) {
  const Problem& p = c.p;
  const bool transposed = c.form == Form::transposed;
  const ScalarType type = compute_type({c.in, c.kernel, c.out});
  const int64_t rows = transposed ? p.n : p.m, columns = transposed ? p.m : p.n;
  // (kernels, rows, columns, b) -> (bins, kernels, m, n)
  const auto bins = [&](const Tensor& w) {
    const int64_t count = w.size(0);
    const Tensor w_hat = scaled(spectra(w, type, count * rows, columns, p.b), c.scale);
    const Tensor each = torch::stable::reshape(w_hat, {p.bins() * count, rows, columns});
    return torch::stable::reshape(
        transposed ? adjoint_of(each) : each, {p.bins(), count, p.m, p.n});
  };
  if (c.index->size(0) <= c.kernel.size(0)) {  // fewer transforms, of those that are taken
    return convolve_many(c, kScaleByLength, [&](const Tensor& kernels) {
      return bins(call_aten("aten::index_select", c.kernel, int64_t{0}, kernels));
    });
  }
  const Tensor every = bins(c.kernel);
  convolve_many(c, kScaleByLength, [&](const Tensor& kernels) {
    return call_aten("aten::index_select", every, int64_t{1}, kernels);
  });
}

// The numbers at the front of what is given for each of a stack of prepared kernels.
inline Tensor by_kernel(const Tensor& w_hat, int64_t numbers) {
  Tensor rows =
      torch::stable::reshape(w_hat, {w_hat.size(0), w_hat.size(1) * w_hat.size(2) * w_hat.size(3)});
  return torch::stable::narrow(rows, 1, 0, numbers);
}

// Prepared ones that lie bin by bin.
inline void convolve_many_prepared(const Convolution& c, int64_t scaling) {
  const Problem& p = c.p;
  const Tensor every = by_kernel(readable(c.kernel), 2 * p.bins() * p.m * p.n);
  convolve_many(c, scaling, [&](const Tensor& kernels) {
    const Tensor bins = call_aten("aten::index_select", every, int64_t{0}, kernels);
    const Tensor complex = call_aten(
        "aten::view_as_complex",
        torch::stable::reshape(bins, {kernels.size(0), p.bins(), p.m * p.n, 2}));
    return torch::stable::contiguous(call_aten("aten::permute", complex, Dims{1, 0, 2}));
  });
}

// A gradient for each row, then sums over the rows of a kernel.
inline void gradients_of_many(const Gradients& c) {
  const Problem& p = c.p;
  const ScalarType type = compute_type({c.g, c.x, c.dw});
  const int64_t rows = c.index->size(0), each = p.tokens / rows, size = p.m * p.n * p.b;
  Tensor sums = torch::stable::new_zeros(c.g, {c.dw.size(0), size}, type);
  const Rows by_row(*c.index, c.g, spectrum_bytes(p));
  by_row.for_some([&](int64_t first, int64_t count, const Tensor& kernels) {
    const auto spectra_of = [&](const Tensor& a, int64_t blocks) {
      const Tensor some = some_rows(a, p, rows, first, count);
      return torch::stable::reshape(
          spectra(some, type, count * each, blocks, p.b), {p.bins() * count, each, blocks});
    };
    const Tensor dw_hat =
        torch::stable::matmul(adjoint_of(spectra_of(c.g, p.m)), spectra_of(c.x, p.n));
    const Tensor dw = by_row.masked(
        signals(torch::stable::reshape(dw_hat, {p.bins(), count * p.m, p.n}), p.b), first, count);
    const Tensor to = call_aten(
        "aten::expand", torch::stable::reshape(kernels, {count, 1}), Dims{count, size},
        /* implicit= */ false);
    sums = call_aten("aten::scatter_add", sums, int64_t{0}, to, dw);
  });
  write(scaled(sums, c.scale), nullptr, c.dw);
}

}  // namespace c3a::composed
