// Calls of ATen's operators that the stable ABI has no function for.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <string>

namespace c3a {

// `name` is an operator's, with its overload after a dot if it has one; the result is a tensor.
template <class... Args>
torch::stable::Tensor call_aten(const std::string& name, const Args&... args) {
  namespace abi = torch::stable::detail;
  std::array<StableIValue, sizeof...(Args)> stack{abi::from(args)...};
  const size_t dot = std::min(name.find('.'), name.size());
  const std::string overload = name.substr(std::min(dot + 1, name.size()));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      name.substr(0, dot).c_str(), overload.c_str(), stack.data(), TORCH_ABI_VERSION));
  return abi::to<torch::stable::Tensor>(stack[0]);
}

// The conjugate transpose of every matrix of a batch; nothing is moved.
inline torch::stable::Tensor adjoint(const torch::stable::Tensor& a) {
  return call_aten("aten::conj", torch::stable::transpose(a, 1, 2));
}

}  // namespace c3a
