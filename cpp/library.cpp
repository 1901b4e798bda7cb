// The schemas of the operators, for every device. Shapes and formulas: DESIGN.md, "The operator".
// Implementations: cpu.cpp, aten.cpp and ../cuda/cuda.cpp. Python rules: ../python/c3a/ops.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(c3a, m) {
  m.def("block_circ_conv(Tensor x, Tensor w, float scale=1.0) -> Tensor");
  m.def("block_circ_conv_add(Tensor base, Tensor x, Tensor w, float scale=1.0) -> Tensor");
  m.def("block_circ_conv_add_(Tensor(a!) base, Tensor x, Tensor w, float scale=1.0) -> ()");
  m.def("block_circ_conv_input_grad(Tensor grad_output, Tensor w, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_kernel_grad(Tensor grad_output, Tensor x, int block_size, "
      "ScalarType? dtype=None, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_backward(Tensor grad_output, Tensor x, Tensor w, float scale=1.0) "
      "-> (Tensor, Tensor)");
  // The CPU's forward and input gradient in two steps: ../python/c3a/spectra.py keeps the first
  // one's result. It is empty for block sizes that have no spectra; the second step does nothing
  // and returns False if the kernel is no longer what the spectra were computed from.
  m.def(
      "_kernel_spectra(Tensor w, ScalarType dtype, bool transposed=False, float scale=1.0) "
      "-> Tensor");
  m.def(
      "_apply_spectra(Tensor(a!) out, Tensor a, Tensor w, Tensor w_hat, bool transposed=False, "
      "Tensor? base=None) -> bool");
}
