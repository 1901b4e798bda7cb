//   A^ = rfft(a): (rows, blocks, b) -> (bins, rows, blocks), then the row of Product's table that
//   is asked for, then irfft back. Spectra are ATen complex tensors; sums run in compute_type().

#include "aten.h"

#include "dispatch.h"

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

// `scale` goes to the factor or the result that has a kernel's size.
Tensor contract(Product product, const Tensor& a_hat, const Tensor& b_hat, double scale) {
  const auto adjoint_of = [](const Tensor& t) { return torch::stable::contiguous(adjoint(t)); };
  const auto scaled = [scale](const Tensor& kernel_hat) {
    if (scale == 1) return kernel_hat;
    const Tensor factor = torch::stable::full({}, scale, ScalarType::Double);
    return call_aten("aten::mul.Tensor", kernel_hat, factor);
  };
  switch (product) {
    case Product::forward: return torch::stable::matmul(a_hat, adjoint_of(scaled(b_hat)));
    case Product::input_grad: return torch::stable::matmul(a_hat, scaled(b_hat));
    case Product::kernel_grad: return scaled(torch::stable::matmul(adjoint_of(a_hat), b_hat));
  }
  throw std::logic_error("c3a: unknown product");
}

}  // namespace

void Aten::run(
    const Problem& p, Product product, const Tensor& a, const Tensor& b, double scale,
    const Tensor* base, Tensor& out) {
  const ScalarType type = compute_type({a, b, out});
  const int64_t a_blocks = product == Product::forward ? p.n : p.m;
  const int64_t b_rows = product == Product::kernel_grad ? p.tokens : p.m;
  const Tensor a_hat = spectra(a, type, p.tokens, a_blocks, p.b);
  const Tensor b_hat = spectra(b, type, b_rows, p.n, p.b);
  inverse(contract(product, a_hat, b_hat, scale), p.b, base, out);
}

void Aten::backward(
    const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
    Tensor& dw) {
  const ScalarType type = compute_type({g, x, w});
  const Tensor g_hat = spectra(g, type, p.tokens, p.m, p.b);
  const Tensor w_hat = spectra(w, type, p.m, p.n, p.b);
  inverse(contract(Product::input_grad, g_hat, w_hat, scale), p.b, nullptr, dx);
  const Tensor x_hat = spectra(x, type, p.tokens, p.n, p.b);
  inverse(contract(Product::kernel_grad, g_hat, x_hat, scale), p.b, nullptr, dw);
}

}  // namespace c3a

STABLE_TORCH_LIBRARY_IMPL(c3a, CompositeExplicitAutograd, m) {
  c3a::Operators<c3a::Aten>::register_all(m);
}
