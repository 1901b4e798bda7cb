//   a^ = rfft(a): (rows, blocks, b) -> (bins, rows, blocks), a product per bin, then irfft back.
//
// Spectra are ATen complex tensors; a kernel's are (bins, m, n), prepared ones too, as pairs of
// real numbers at the front of what is given for them.

#include "aten.h"

namespace c3a {
namespace {

// ATen's own codes for the scaling of a transform (at::native::fft_norm_mode).
constexpr int64_t kNoScaling = 0;
constexpr int64_t kScaleByLength = 2;

using Dims = std::vector<int64_t>;

// (rows * blocks * b) numbers -> (bins, rows, blocks), complex and contiguous, which keeps the
// batched product from copying bin by bin
Tensor spectra(const Tensor& a, ScalarType type, int64_t rows, int64_t blocks, int64_t b) {
  const Tensor blocked = torch::stable::to(torch::stable::reshape(a, {rows, blocks, b}), type);
  const Tensor a_hat =
      call_aten("aten::_fft_r2c", blocked, Dims{2}, kNoScaling, /* onesided= */ true);
  return torch::stable::contiguous(call_aten("aten::permute", a_hat, Dims{2, 0, 1}));
}

Tensor scaled(const Tensor& a_hat, double scale) {
  if (scale == 1) return a_hat;
  const Tensor factor = torch::stable::full({}, scale, ScalarType::Double);
  return call_aten("aten::mul.Tensor", a_hat, factor);
}

// A kernel's spectra (bins, m, n), or those of the transposed matrix: w is (n, m, b) then.
Tensor kernel_spectra(
    const Problem& p, const Tensor& w, ScalarType type, bool transposed, double scale) {
  if (!transposed) return scaled(spectra(w, type, p.m, p.n, p.b), scale);
  return adjoint(scaled(spectra(w, type, p.n, p.m, p.b), scale));
}

// (bins, rows, blocks), complex -> `out`, which holds rows * blocks * b numbers, onto `base` if
// given
void inverse(const Tensor& a_hat, int64_t b, const Tensor* base, Tensor& out) {
  const Tensor by_row = call_aten("aten::permute", a_hat, Dims{1, 2, 0});
  const Tensor a = call_aten("aten::_fft_c2r", by_row, Dims{2}, kScaleByLength, b);
  const Tensor result = torch::stable::reshape(a, out.sizes());
  if (!base) {
    torch::stable::copy_(out, result);
  } else {
    // The sum takes the wider of the two types.
    torch::stable::copy_(out, torch::stable::subtract(result, *base, -1));
  }
}

Tensor adjoint_of(const Tensor& t) { return torch::stable::contiguous(adjoint(t)); }

}  // namespace

void Aten::convolve(const Convolution& c) {
  const Problem& p = c.p;
  const ScalarType type = compute_type({c.in, c.kernel, c.out});
  const Tensor w_hat = c.form == Form::prepared
                           ? prepared_bins(p, readable(c.kernel), 0)
                           : kernel_spectra(p, c.kernel, type, c.form == Form::transposed, c.scale);
  const Tensor in_hat = spectra(c.in, type, p.tokens, p.n, p.b);
  inverse(torch::stable::matmul(in_hat, adjoint_of(w_hat)), p.b, c.base, c.out);
}

void Aten::gradients(const Gradients& c) {
  const Problem& p = c.p;
  const ScalarType type =
      c.w ? compute_type({c.g, c.x, *c.w, *c.dx}) : compute_type({c.g, c.x, c.dw});
  const Tensor g_hat = spectra(c.g, type, p.tokens, p.m, p.b);
  if (c.dx) {
    const Tensor w_hat = kernel_spectra(p, *c.w, type, /* transposed= */ false, c.scale);
    inverse(torch::stable::matmul(g_hat, w_hat), p.b, c.base, *c.dx);
  }
  const Tensor x_hat = spectra(c.x, type, p.tokens, p.n, p.b);
  const Tensor dw_hat = torch::stable::matmul(adjoint_of(g_hat), x_hat);
  inverse(scaled(dw_hat, c.scale), p.b, nullptr, c.dw);
}

void Aten::prepare(const Preparation& c) {
  const auto [count, m, n, b] = c.kernels;
  const Problem one{1, c.transposed ? n : m, c.transposed ? m : n, b};
  Tensor kernels = torch::stable::reshape(c.w, {count, m * n * b});
  for (int64_t kernel = 0; kernel < count; ++kernel) {
    const Tensor w = torch::stable::narrow(kernels, 0, kernel, 1);
    Tensor to = prepared_bins(one, c.out, kernel);
    torch::stable::copy_(to, kernel_spectra(one, w, c.out.scalar_type(), c.transposed, c.scale));
  }
}

}  // namespace c3a

C3A_LIBRARY_IMPL(CompositeExplicitAutograd, m) { c3a::Operators<c3a::Aten>::register_all(m); }
