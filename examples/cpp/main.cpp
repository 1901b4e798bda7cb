// The operator from C++, without Python: libc3a_cpu.so is loaded at run time, and what it registers
// is called by name through torch's dispatcher. Gradients are operators of their own here, since
// the autograd rules are the Python package's.
//
//   block_circ_conv <site-packages>/c3a/libc3a_cpu.so

#include <ATen/ATen.h>
#include <ATen/DynamicLibrary.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <tuple>

namespace {

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The definition: block (i, j) is the circulant matrix whose first row is w[i, j].
at::Tensor circulant(const at::Tensor& w) {
  const int64_t m = w.size(0), n = w.size(1), b = w.size(2);
  const at::Tensor t = at::arange(b);
  const at::Tensor index = (t.unsqueeze(0) - t.unsqueeze(1)).remainder(b);
  return w.index({at::indexing::Slice(), at::indexing::Slice(), index})
      .permute({0, 2, 1, 3})
      .reshape({m * b, n * b});
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: block_circ_conv libc3a_cpu.so\n";
    return 2;
  }
  const at::DynamicLibrary library(argv[1]);
  const auto forward = operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, double)>(
      "c3a::block_circ_conv");
  const auto backward = operator_named<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
      "c3a::block_circ_conv_backward");

  at::manual_seed(0);
  const double scale = 0.5;
  const at::Tensor w = at::randn({3, 2, 64});  // (m, n, b)
  const at::Tensor x = at::randn({10, 2 * 64});
  const at::Tensor y = forward.call(x, w, scale);
  const at::Tensor dense = circulant(w) * scale;
  std::cout << "y has shape " << y.sizes() << "\n";

  const at::Tensor grad_output = at::randn_like(y);
  const auto [grad_x, grad_w] = backward.call(grad_output, x, w, scale);
  const double error =
      std::max(largest(y - x.matmul(dense.t())), largest(grad_x - grad_output.matmul(dense)));

  // The kernel's gradient: the change of sum(grad_output * y) in one direction; y is linear in w.
  const at::Tensor direction = at::randn_like(w);
  const double expected = (grad_output * forward.call(x, direction, scale)).sum().item<double>();
  const double got = (grad_w * direction).sum().item<double>();

  std::cout << "largest difference from the dense matrix: " << error << "\n"
            << "derivative for the kernel: " << got << ", expected " << expected << "\n";
  return error < 1e-3 && std::abs(got - expected) < 1e-2 ? 0 : 1;
}
