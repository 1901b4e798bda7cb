// The CUDA back end for ../cpp/operators.h.

#pragma once

#include "../cpp/operators.h"

namespace c3a::cuda {

struct Cuda {
  static void run(
      const Problem& p, Product which, const Tensor& a, const Tensor& b, double scale,
      const Tensor* base, Tensor& out);
  static void backward(
      const Problem& p, const Tensor& g, const Tensor& x, const Tensor& w, double scale, Tensor& dx,
      Tensor& dw);
};

}  // namespace c3a::cuda
