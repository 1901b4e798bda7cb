// The back end of every device that has no library of its own, and of block sizes that the CPU's
// kernels have no passes for: ATen's real FFTs around one batched complex product.

#pragma once

#include "operators.h"

namespace c3a {

struct Aten {
  static void run(
      const Problem& p, Product product, const Tensor& a, const Tensor& b, double scale,
      const Tensor* base, Tensor& out);
  static void backward(
      const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
      Tensor& dw);
};

}  // namespace c3a
