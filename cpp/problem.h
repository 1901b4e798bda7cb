// The shape of one block-circular convolution, and every rule that its operands obey:
//
//   y_i = sum_j C(w_ij) x_j,   i < m, j < n,   C(w)[u, t] = w[(t - u) mod b]
//
//   x, dx: (..., n*b)     w, dw: (m, n, b)     y, g: (..., m*b)     tokens: product of "..."
//
// python/c3a/ops.py states the same rules for symbolic sizes; tests/test_errors.py holds the two
// equal, message by message.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace c3a {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "c3a." << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  const std::string index = std::to_string(t.get_device_index());
  return (t.is_cuda() ? "cuda:" : "device ") + index;
}

inline std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(type);
  }
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Sums run in float64 when an operand or the result is float64, in float32 otherwise; results round
// once.
inline ScalarType compute_type(std::initializer_list<Tensor> operands_and_results) {
  for (const Tensor& t : operands_and_results) {
    if (t.scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

struct Problem {
  int64_t tokens, m, n, b;
  int64_t in_features() const { return n * b; }
  int64_t out_features() const { return m * b; }
  int64_t bins() const { return b / 2 + 1; }
};

// A tensor of activations, named as in the schema.
struct Named {
  const char* name;
  const Tensor& tensor;
};

inline void check_supported(const char* op, const char* what, ScalarType type) {
  check(
      is_supported(type), op, "expected ", what,
      " to be float64, float32, bfloat16 or float16, got ", name(type));
}

inline void check_floating(const char* op, const Named& a) {
  check_supported(op, a.name, a.tensor.scalar_type());
}

inline void check_same_device(const char* op, const Named& a, const Named& b) {
  const bool same = a.tensor.is_cpu() == b.tensor.is_cpu() &&
                    a.tensor.get_device_index() == b.tensor.get_device_index();
  check(
      same, op, "expected ", a.name, " and ", b.name, " on one device, got ", device(a.tensor),
      " and ", device(b.tensor));
}

inline int64_t check_tokens(const char* op, const Named& a) {
  check(
      a.tensor.dim() >= 1, op, "expected ", a.name, " to have at least 1 dimension, got shape ()");
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < a.tensor.dim(); ++d) tokens *= a.tensor.size(d);
  return tokens;
}

inline void check_kernel(const char* op, const Tensor& w) {
  check_floating(op, {"w", w});
  const bool right = w.dim() == 3 && w.size(0) >= 1 && w.size(1) >= 1 && w.size(2) >= 1;
  check(right, op, "expected a kernel w of shape (m, n, b) with m, n, b >= 1, got ", shape(w));
}

inline void check_same_leading(const char* op, const Tensor& g, const Tensor& x) {
  bool same = g.dim() == x.dim();
  for (int64_t d = 0; same && d + 1 < g.dim(); ++d) same = g.size(d) == x.size(d);
  check(
      same, op, "expected grad_output and x to have the same leading dimensions, got ", shape(g),
      " and ", shape(x));
}

// What a result is added onto, or written into: shaped like x, but for the last dimension.
inline void check_onto(
    const char* op, const char* what, const Tensor& base, const Tensor& x, int64_t features) {
  check_floating(op, {what, base});
  check_same_device(op, {what, base}, {"x", x});
  bool same = base.dim() == x.dim() && base.size(-1) == features;
  for (int64_t d = 0; same && d + 1 < x.dim(); ++d) same = base.size(d) == x.size(d);
  std::ostringstream expected;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) expected << x.size(d) << ", ";
  expected << features << (x.dim() == 1 ? "," : "");
  check(same, op, "expected ", what, " of shape (", expected.str(), "), got ", shape(base));
}

// One tensor of activations with a kernel: the forward (`blocks` is "n") and the input gradient
// ("m").
inline Problem problem_of(const char* op, const Named& a, const Tensor& w, const char* blocks) {
  check_floating(op, a);
  check_kernel(op, w);
  check_same_device(op, a, {"w", w});
  const int64_t tokens = check_tokens(op, a);
  const Problem p{tokens, w.size(0), w.size(1), w.size(2)};
  const int64_t features = *blocks == 'n' ? p.in_features() : p.out_features();
  check(
      a.tensor.size(-1) == features, op, "expected ", a.name, ".size(-1) == ", blocks,
      " * b = ", features, " for a kernel of shape ", shape(w), ", got ", a.tensor.size(-1));
  return p;
}

// Two tensors of activations and a block size: the kernel gradient.
inline Problem problem_of(const char* op, const Tensor& g, const Tensor& x, int64_t b) {
  const Named named_g{"grad_output", g}, named_x{"x", x};
  check_floating(op, named_g);
  check_floating(op, named_x);
  check_same_device(op, named_g, named_x);
  check(b >= 1, op, "expected block_size >= 1, got ", b);
  const int64_t tokens = check_tokens(op, named_g);
  check_tokens(op, named_x);
  check_same_leading(op, g, x);
  for (const Named& a : {named_g, named_x}) {
    const int64_t features = a.tensor.size(-1);
    check(
        features >= b && features % b == 0, op, "expected ", a.name,
        ".size(-1) to be a positive multiple of block_size = ", b, ", got ", features);
  }
  return {tokens, g.size(-1) / b, x.size(-1) / b, b};
}

}  // namespace c3a
