// The composition of composed.h, with a kernel's spectra (bins, m, n), prepared ones too, as pairs
// of real numbers at the front of what is given for them.

#include "aten.h"

#include "composed.h"

namespace c3a {
namespace {

using namespace composed;  // NOLINT: its own steps

// A kernel's spectra (bins, m, n), or those of the transposed matrix: w is (n, m, b) then.
Tensor kernel_spectra(
    const Problem& p, const Tensor& w, ScalarType type, bool transposed, double scale) {
  if (!transposed) return scaled(spectra(w, type, p.m, p.n, p.b), scale);
  return adjoint(scaled(spectra(w, type, p.n, p.m, p.b), scale));
}

}  // namespace

void Aten::convolve(const Convolution& c) {
  const Problem& p = c.p;
  if (c.index) {
    return c.form == Form::prepared ? convolve_many_prepared(c, kScaleByLength)
                                    : convolve_many_kernels(c);
  }
  const ScalarType type = compute_type({c.in, c.kernel, c.out});
  const Tensor w_hat = c.form == Form::prepared
                           ? prepared_bins(p, readable(c.kernel), 0)
                           : kernel_spectra(p, c.kernel, type, c.form == Form::transposed, c.scale);
  const Tensor in_hat = spectra(c.in, type, p.tokens, p.n, p.b);
  write(signals(torch::stable::matmul(in_hat, adjoint_of(w_hat)), p.b), c.base, c.out);
}

void Aten::gradients(const Gradients& c) {
  const Problem& p = c.p;
  if (c.index) return gradients_of_many(c);
  const ScalarType type =
      c.w ? compute_type({c.g, c.x, *c.w, *c.dx}) : compute_type({c.g, c.x, c.dw});
  const Tensor g_hat = spectra(c.g, type, p.tokens, p.m, p.b);
  if (c.dx) {
    const Tensor w_hat = kernel_spectra(p, *c.w, type, /* transposed= */ false, c.scale);
    write(signals(torch::stable::matmul(g_hat, w_hat), p.b), c.base, *c.dx);
  }
  const Tensor x_hat = spectra(c.x, type, p.tokens, p.n, p.b);
  const Tensor dw_hat = torch::stable::matmul(adjoint_of(g_hat), x_hat);
  write(signals(scaled(dw_hat, c.scale), p.b), nullptr, c.dw);
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
