// The shape of one block-circular convolution, and every rule that its operands obey:
//
//   y_i = sum_j C(w_ij) x_j,   i < m, j < n,   C(w)[u, t] = w[(t - u) mod b]
//
//   x, dx: (..., n*b)     w, dw: (m, n, b)     y, g: (..., m*b)     tokens: product of "..."
//   w_hat: (m, n, prepared_length), or (n, m, prepared_length) for the transposed matrix
//
// With a stack of kernels, w (adapters, m, n, b), x is (rows, ..., n*b) and index (rows,) tells the
// kernel of each row, -1 for none.
//
// python/c3a/shapes.py states the same rules for symbolic sizes; tests/test_errors.py holds the two
// equal, message by message.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "element.h"

namespace c3a {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a user did wrong, in words.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
void check(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "c3a." << op << ": ";
  ((message << parts), ...);
  throw Refusal(message.str());
}

// A part of a message that is made only where the message is: streams cost more than all the rules.
template <class Write>
struct Part {
  Write write;
  friend std::ostream& operator<<(std::ostream& message, const Part& part) {
    part.write(message);
    return message;
  }
};
template <class Write>
Part(Write) -> Part<Write>;

// `size(d)` for d < dimensions
template <class Size>
auto tuple(int64_t dimensions, Size size) {
  return Part{[=](std::ostream& message) {
    message << '(';
    for (int64_t d = 0; d < dimensions; ++d) message << (d ? ", " : "") << size(d);
    message << (dimensions == 1 ? ",)" : ")");
  }};
}
inline auto shape(const Tensor& t) {
  return tuple(t.dim(), [&t](int64_t d) { return t.size(d); });
}
inline auto strides(const Tensor& t) {
  return tuple(t.dim(), [&t](int64_t d) { return t.stride(d); });
}

inline auto device(const Tensor& t) {
  return Part{[&t](std::ostream& message) {
    if (t.is_cpu()) {
      message << "cpu";
    } else {
      message << (t.is_cuda() ? "cuda:" : "device ") << t.get_device_index();
    }
  }};
}

// The one list of dtypes that the operator takes.
inline std::optional<Element> element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Element::f64;
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: return std::nullopt;
  }
}
inline Element element_of(const Tensor& t) { return element_of(t.scalar_type()).value(); }

// A dtype's name in Python, by its number: also of those that the stable ABI does not know.
inline auto dtype_name(int32_t type) {
  static constexpr const char* names[] = {
      "uint8",
      "int8",
      "int16",
      "int32",
      "int64",
      "float16",
      "float32",
      "float64",
      "complex32",
      "complex64",
      "complex128",
      "bool",
      "qint8",
      "quint8",
      "qint32",
      "bfloat16",
      "quint4x2",
      "quint2x4",
      "bits1x8",
      "bits2x4",
      "bits4x2",
      "bits8",
      "bits16",
      "float8_e5m2",
      "float8_e4m3fn",
      "float8_e5m2fnuz",
      "float8_e4m3fnuz",
      "uint16",
      "uint32",
      "uint64",
      "uint1",
      "uint2",
      "uint3",
      "uint4",
      "uint5",
      "uint6",
      "uint7",
      "int1",
      "int2",
      "int3",
      "int4",
      "int5",
      "int6",
      "int7",
      "float8_e8m0fnu",
      "float4_e2m1fn_x2"};
  return Part{[=](std::ostream& message) {
    const bool known = type >= 0 && type < static_cast<int32_t>(std::size(names));
    known ? message << names[type] : message << "dtype number " << type;
  }};
}

inline auto layout_name(int32_t layout) {
  return Part{[=](std::ostream& message) {
    if (layout == aoti_torch_layout_sparse_coo()) {
      message << "sparse_coo";
    } else if (layout == aoti_torch_layout_sparse_csr()) {
      message << "sparse_csr";
    } else if (layout == aoti_torch_layout_sparse_csc()) {
      message << "sparse_csc";
    } else if (layout == aoti_torch_layout_sparse_bsr()) {
      message << "sparse_bsr";
    } else if (layout == aoti_torch_layout_sparse_bsc()) {
      message << "sparse_bsc";
    } else if (layout == aoti_torch_layout__mkldnn()) {
      message << "_mkldnn";
    } else {
      message << "layout number " << layout;
    }
  }};
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
  Problem transposed() const { return {tokens, n, m, b}; }
};

// Numbers that a block takes in a prepared kernel: the complex bins of its spectrum. On the CPU
// there is room behind the spectra, at least kPreparedRoom numbers in all, and so a prepared kernel
// of another device is told by its shape.
constexpr int64_t kPreparedRoom = 32;
inline int64_t prepared_length(int64_t m, int64_t n, int64_t b, bool on_cpu) {
  const int64_t room = (kPreparedRoom + m * n - 1) / (m * n);
  return 2 * (b / 2 + 1) + (on_cpu ? room + room % 2 : 0);
}

// A tensor, named as in the schema.
struct Named {
  const char* name;
  const Tensor& tensor;
};

inline int32_t dtype_of(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

inline void check_supported(const char* op, const char* what, int32_t type) {
  check(
      element_of(static_cast<ScalarType>(type)).has_value(), op, "expected ", what,
      " to be float64, float32, bfloat16 or float16, got ", dtype_name(type));
}
inline void check_supported(const char* op, const char* what, ScalarType type) {
  check_supported(op, what, static_cast<int32_t>(type));
}

// A dense tensor of a dtype that is taken.
inline void check_numbers(const char* op, const Named& a) {
  check(a.tensor.defined(), op, "expected ", a.name, " to be a tensor, got None");
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(a.tensor.get(), &layout));
  check(
      layout == aoti_torch_layout_strided(), op, "expected ", a.name,
      " to be a dense tensor (torch.strided), got torch.", layout_name(layout));
  check_supported(op, a.name, dtype_of(a.tensor));
}

inline void check_same_device(const char* op, const Named& a, const Named& b) {
  int32_t a_type = 0, b_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.tensor.get(), &a_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.tensor.get(), &b_type));
  const bool same = a_type == b_type && a.tensor.get_device_index() == b.tensor.get_device_index();
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
  check_numbers(op, {"w", w});
  const bool right = w.dim() == 3 && w.size(0) >= 1 && w.size(1) >= 1 && w.size(2) >= 1;
  check(right, op, "expected a kernel w of shape (m, n, b) with m, n, b >= 1, got ", shape(w));
}

inline void check_stack(const char* op, const Tensor& w) {
  check_numbers(op, {"w", w});
  bool right = w.dim() == 4;
  for (int64_t d = 0; right && d < 4; ++d) right = w.size(d) >= 1;
  check(right, op, "expected kernels w of shape (adapters, m, n, b), each >= 1, got ", shape(w));
}

// A kernel, or a stack of `count`: (..., m, n, b).
struct Kernels {
  int64_t count, m, n, b;
};

inline Kernels kernels_of(const char* op, const Tensor& w) {
  check_numbers(op, {"w", w});
  const int64_t d = w.dim() - 3;
  const bool right = d >= 0 && w.size(d) >= 1 && w.size(d + 1) >= 1 && w.size(d + 2) >= 1;
  check(right, op, "expected kernels w of shape (..., m, n, b) with m, n, b >= 1, got ", shape(w));
  int64_t count = 1;
  for (int64_t e = 0; e < d; ++e) count *= w.size(e);
  return {count, w.size(d), w.size(d + 1), w.size(d + 2)};
}

inline void check_same_leading(const char* op, const Tensor& g, const Tensor& x) {
  bool same = g.dim() == x.dim();
  for (int64_t d = 0; same && d + 1 < g.dim(); ++d) same = g.size(d) == x.size(d);
  check(
      same, op, "expected grad_output and x to have the same leading dimensions, got ", shape(g),
      " and ", shape(x));
}

// What a result is added onto: shaped like x, but for the last dimension.
inline void check_base(const char* op, const Named& base, const Tensor& x, int64_t features) {
  check_numbers(op, base);
  check_same_device(op, base, {"x", x});
  const Tensor& t = base.tensor;
  const int64_t last = x.dim() - 1;
  const auto expected = [&x, last, features](int64_t d) { return d < last ? x.size(d) : features; };
  bool same = t.dim() == last + 1;
  for (int64_t d = 0; same && d <= last; ++d) same = t.size(d) == expected(d);
  check(
      same, op, "expected ", base.name, " of shape ", tuple(last + 1, expected), ", got ",
      shape(t));
}

// A linear layer beside the kernel: weight (m*b, n*b), and bias (m*b) of the same dtype or none.
inline void check_linear(
    const char* op, const Problem& p, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias) {
  check_numbers(op, {"weight", weight});
  check_same_device(op, {"weight", weight}, {"x", x});
  const int64_t out = p.out_features(), in = p.in_features();
  check(
      weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in, op,
      "expected weight of shape (", out, ", ", in, "), as the kernel's, got ", shape(weight));
  if (!bias) return;
  check_numbers(op, {"bias", *bias});
  check_same_device(op, {"bias", *bias}, {"x", x});
  check(
      bias->dim() == 1 && bias->size(0) == out, op, "expected bias of shape (", out, ",), got ",
      shape(*bias));
  check(
      bias->scalar_type() == weight.scalar_type(), op, "expected bias in ",
      dtype_name(dtype_of(weight)), ", as weight is, got ", dtype_name(dtype_of(*bias)));
}

// What is written in place: no two of its elements may lie in one place.
inline void check_writable(const char* op, const Named& base) {
  const Tensor& t = base.tensor;
  bool apart = true;
  for (int64_t d = 0; d < t.dim(); ++d) apart = apart && (t.size(d) < 2 || t.stride(d));
  check(
      apart, op, "expected a ", base.name, " that is not expanded, got strides ", strides(t),
      " for shape ", shape(t), "; call ", base.name, ".contiguous() first");
}

// Which kernel of a stack each row of `a` takes. Entries are looked at where that does not wait for
// a device.
inline void check_index(const char* op, const Named& a, const Tensor& index, int64_t adapters) {
  check(index.defined(), op, "expected index to be a tensor, got None");
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(index.get(), &layout));
  check(
      layout == aoti_torch_layout_strided(), op,
      "expected index to be a dense tensor (torch.strided), got torch.", layout_name(layout));
  check(
      dtype_of(index) == static_cast<int32_t>(ScalarType::Long), op,
      "expected index to be int64, got ", dtype_name(dtype_of(index)));
  if (!index.is_cpu()) check_same_device(op, {"index", index}, a);
  const int64_t rows = a.tensor.size(0);
  check(
      index.dim() == 1 && index.size(0) == rows, op, "expected index of shape (", rows,
      ",), an entry for each row of ", a.name, ", got ", shape(index));
  if (!index.is_cpu()) return;
  const int64_t* entries = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t entry = entries[r * index.stride(0)];
    check(
        -1 <= entry && entry < adapters, op, "expected -1 <= index < ", adapters,
        ", the number of adapters, got index[", r, "] = ", entry);
  }
}

// Rows of activations for kernels of a stack; returns the number of tokens.
inline int64_t check_rows(const char* op, const Named& a) {
  check(
      a.tensor.dim() >= 2, op, "expected ", a.name, " of shape (rows, ..., features), got ",
      shape(a.tensor));
  return check_tokens(op, a);
}

// One tensor of activations with a kernel, or with a stack of them and an index: the forward
// (`blocks` is "n") and the input gradient ("m").
inline Problem problem_of(
    const char* op, const Named& a, const Tensor& w, const char* blocks,
    const Tensor* index = nullptr) {
  check_numbers(op, a);
  index ? check_stack(op, w) : check_kernel(op, w);
  check_same_device(op, a, {"w", w});
  const int64_t tokens = index ? check_rows(op, a) : check_tokens(op, a);
  const int64_t first = index ? 1 : 0;
  const Problem p{tokens, w.size(first), w.size(first + 1), w.size(first + 2)};
  const int64_t features = *blocks == 'n' ? p.in_features() : p.out_features();
  check(
      a.tensor.size(-1) == features, op, "expected ", a.name, ".size(-1) == ", blocks,
      " * b = ", features, index ? " for kernels of shape " : " for a kernel of shape ", shape(w),
      ", got ", a.tensor.size(-1));
  if (index) check_index(op, a, *index, w.size(0));
  return p;
}

// Both gradients.
inline Problem problem_of_pair(const char* op, const Tensor& g, const Tensor& x, const Tensor& w) {
  const Problem p = problem_of(op, {"x", x}, w, "n");
  problem_of(op, {"grad_output", g}, w, "m");
  check_same_device(op, {"grad_output", g}, {"x", x});
  check_same_leading(op, g, x);
  return p;
}

inline void check_prepared(const char* op, const Named& w_hat, int64_t b, bool stack) {
  check_numbers(op, w_hat);
  const Tensor& t = w_hat.tensor;
  check(
      t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op,
      "expected ", w_hat.name, " in float32 or float64, as c3a.prepare makes it, got ",
      dtype_name(dtype_of(t)));
  bool blocks = t.dim() == (stack ? 4 : 3);
  for (int64_t d = 0; blocks && d + 1 < t.dim(); ++d) blocks = t.size(d) >= 1;
  check(
      blocks, op, stack ? "expected prepared kernels " : "expected a prepared kernel ", w_hat.name,
      stack ? " of shape (adapters, m, n, numbers), got " : " of shape (m, n, numbers), got ",
      shape(t));
  const int64_t length = prepared_length(t.size(-3), t.size(-2), b, t.is_cpu());
  check(
      t.size(-1) == length, op, "expected ", w_hat.name, ".size(-1) == ", length,
      ", as c3a.prepare makes it for block_size = ", b, " on this device, got ", t.size(-1));
}

// One tensor of activations with a prepared kernel, or a stack of them and an index, and the
// transposed one for its gradient.
inline Problem problem_of_prepared(
    const char* op, const Tensor& x, const Tensor& w_hat, int64_t b,
    const std::optional<Tensor>& w_hat_transposed, const Tensor* index = nullptr) {
  check_numbers(op, {"x", x});
  const int64_t tokens = index ? check_rows(op, {"x", x}) : check_tokens(op, {"x", x});
  check(
      1 <= b && b <= std::max<int64_t>(1, x.size(-1)), op,
      "expected 1 <= block_size <= x.size(-1) = ", x.size(-1), ", got ", b);
  check_prepared(op, {"w_hat", w_hat}, b, index);
  check_same_device(op, {"x", x}, {"w_hat", w_hat});
  const Problem p{tokens, w_hat.size(-3), w_hat.size(-2), b};
  check(
      x.size(-1) == p.in_features(), op,
      "expected x.size(-1) == n * block_size = ", p.in_features(),
      index ? " for prepared kernels of shape " : " for a prepared kernel of shape ", shape(w_hat),
      ", got ", x.size(-1));
  check(
      x.scalar_type() != ScalarType::Double || w_hat.scalar_type() == ScalarType::Double, op,
      "expected w_hat in float64, as x is: c3a.prepare(w, torch.float64)");
  if (w_hat_transposed) {
    const Tensor& t = *w_hat_transposed;
    check_prepared(op, {"w_hat_transposed", t}, b, index);
    check_same_device(op, {"w_hat", w_hat}, {"w_hat_transposed", t});
    const bool mirrored =
        t.size(-3) == p.n && t.size(-2) == p.m && t.size(0) == (index ? w_hat.size(0) : p.n);
    check(
        mirrored, op, "expected w_hat_transposed of shape (",
        index ? "adapters, n, m, numbers) with adapters = " : "n, m, numbers) with ",
        Part{[&](std::ostream& message) {
          if (index) message << w_hat.size(0) << ", ";
        }},
        "n = ", p.n, " and m = ", p.m, ", got ", shape(t));
    check(
        t.scalar_type() == w_hat.scalar_type(), op,
        "expected w_hat and w_hat_transposed of one dtype, got ", dtype_name(dtype_of(w_hat)),
        " and ", dtype_name(dtype_of(t)));
  }
  if (index) check_index(op, {"x", x}, *index, w_hat.size(0));
  return p;
}

// Two tensors of activations and a block size: the kernel gradient, or those of so many adapters.
inline Problem problem_of(
    const char* op, const Tensor& g, const Tensor& x, int64_t b, const Tensor* index = nullptr,
    int64_t adapters = 1) {
  const Named named_g{"grad_output", g}, named_x{"x", x};
  check_numbers(op, named_g);
  check_numbers(op, named_x);
  check_same_device(op, named_g, named_x);
  check(b >= 1, op, "expected block_size >= 1, got ", b);
  check(adapters >= 1, op, "expected adapters >= 1, got ", adapters);
  const int64_t tokens = index ? check_rows(op, named_g) : check_tokens(op, named_g);
  check_tokens(op, named_x);
  check_same_leading(op, g, x);
  for (const Named& a : {named_g, named_x}) {
    const int64_t features = a.tensor.size(-1);
    check(
        features >= b && features % b == 0, op, "expected ", a.name,
        ".size(-1) to be a positive multiple of block_size = ", b, ", got ", features);
  }
  if (index) check_index(op, named_x, *index, adapters);
  return {tokens, g.size(-1) / b, x.size(-1) / b, b};
}

}  // namespace c3a
