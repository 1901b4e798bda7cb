// The schemas of the operators, for every device. Shapes and formulas: DESIGN.md, "The operator".
// Implementations: cpu.cpp, aten.cpp and ../cuda/cuda.cpp. Python rules:
// ../python/c3a/operators.py.

#include "namespace.h"

C3A_LIBRARY(m) {
  m.def("block_circ_conv(Tensor x, Tensor w, float scale=1.0) -> Tensor");
  m.def("block_circ_conv_add(Tensor base, Tensor x, Tensor w, float scale=1.0) -> Tensor");
  m.def("block_circ_conv_add_(Tensor(a!) base, Tensor x, Tensor w, float scale=1.0) -> ()");
  m.def(
      "block_circ_conv_linear(Tensor x, Tensor weight, Tensor? bias, Tensor w, float scale=1.0) "
      "-> Tensor");
  m.def("block_circ_conv_input_grad(Tensor grad_output, Tensor w, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_kernel_grad(Tensor grad_output, Tensor x, int block_size, "
      "ScalarType? dtype=None, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_backward(Tensor grad_output, Tensor x, Tensor w, float scale=1.0) "
      "-> (Tensor, Tensor)");
  m.def(
      "block_circ_conv_backward_add_(Tensor(a!) grad_input, Tensor grad_output, Tensor x, "
      "Tensor w, float scale=1.0) -> Tensor");
  m.def(
      "prepare(Tensor w, ScalarType? dtype=None, bool transposed=False, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_prepared(Tensor x, Tensor w_hat, int block_size, "
      "Tensor? w_hat_transposed=None) -> Tensor");
  m.def(
      "block_circ_conv_prepared_add(Tensor base, Tensor x, Tensor w_hat, int block_size, "
      "Tensor? w_hat_transposed=None) -> Tensor");
  m.def(
      "block_circ_conv_prepared_add_(Tensor(a!) base, Tensor x, Tensor w_hat, int block_size, "
      "Tensor? w_hat_transposed=None) -> ()");
  m.def("block_circ_conv_many(Tensor x, Tensor w, Tensor index, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_many_add_(Tensor(a!) base, Tensor x, Tensor w, Tensor index, "
      "float scale=1.0) -> ()");
  m.def(
      "block_circ_conv_many_input_grad(Tensor grad_output, Tensor w, Tensor index, "
      "float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_many_kernel_grad(Tensor grad_output, Tensor x, Tensor index, int adapters, "
      "int block_size, ScalarType? dtype=None, float scale=1.0) -> Tensor");
  m.def(
      "block_circ_conv_many_prepared(Tensor x, Tensor w_hat, Tensor index, int block_size, "
      "Tensor? w_hat_transposed=None) -> Tensor");
  m.def(
      "block_circ_conv_many_prepared_add_(Tensor(a!) base, Tensor x, Tensor w_hat, Tensor index, "
      "int block_size, Tensor? w_hat_transposed=None) -> ()");
}
