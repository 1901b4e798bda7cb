// The back end of every device that has no library of its own, and of block sizes that the CPU's
// kernels have no passes for: ATen's real FFTs around one batched complex product.

#pragma once

#include "operators.h"

namespace c3a {

struct Aten {
  static void convolve(const Convolution& c);
  static void gradients(const Gradients& c);
  static void prepare(const Preparation& c);
  static void check_prepared(
      const char*, const Problem&, const Tensor&, const Tensor*, const Tensor*) {}
};

}  // namespace c3a
