// The CUDA back end for ../cpp/operators.h.

#pragma once

#include "../cpp/operators.h"

namespace c3a::cuda {

struct Cuda {
  static void convolve(const Convolution& c);
  static void gradients(const Gradients& c);
  static void prepare(const Preparation& c);
  static void check_prepared(
      const char*, const Problem&, const Tensor&, const Tensor*, const Tensor*) {}
};

}  // namespace c3a::cuda
