// Calls of ATen's operators that the stable ABI has no function for, and what becomes of the errors
// of those that it has.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>

#include "problem.h"

// torch 2.13 and newer keep the message of the last error; before, it goes to stderr alone.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace c3a {

// `name` is an operator's, with its overload after a dot if it has one; the result is a tensor.
template <class... Args>
torch::stable::Tensor call_aten(const std::string& name, const Args&... args) {
  namespace abi = torch::stable::detail;
  std::array<StableIValue, sizeof...(Args)> stack{abi::from(args)...};
  const size_t dot = std::min(name.find('.'), name.size());
  const std::string overload = name.substr(std::min(dot + 1, name.size()));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      name.substr(0, dot).c_str(), overload.c_str(), stack.data(), TORCH_ABI_VERSION));
  return abi::to<torch::stable::Tensor>(stack[0]);
}

// The conjugate transpose of every matrix of a batch; nothing is moved.
inline torch::stable::Tensor adjoint(const torch::stable::Tensor& a) {
  return call_aten("aten::conj", torch::stable::transpose(a, 1, 2));
}

// What prepare() filled, where complex numbers can be read: they begin at even places of aligned
// memory, and only a user's own copy does not.
inline torch::stable::Tensor readable(const Tensor& w_hat) {
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(w_hat.get(), &offset));
  const auto place = reinterpret_cast<uintptr_t>(w_hat.const_data_ptr());
  const bool aligned = offset % 2 == 0 && place % (2 * w_hat.element_size()) == 0;
  return aligned ? w_hat : torch::stable::clone(w_hat);
}

// Kernel number `index` of prepared ones whose spectra lie bin by bin, as pairs of real numbers at
// the front of what is given for them: (bins, m, n), complex.
inline torch::stable::Tensor prepared_bins(const Problem& p, const Tensor& w_hat, int64_t index) {
  const int64_t size = p.m * p.n * prepared_length(p.m, p.n, p.b, w_hat.is_cpu());
  Tensor flat = torch::stable::reshape(w_hat, {-1});
  flat = torch::stable::narrow(flat, 0, index * size, 2 * p.bins() * p.m * p.n);
  return call_aten("aten::view_as_complex", torch::stable::view(flat, {p.bins(), p.m, p.n, 2}));
}

// What f returns. An error of torch's keeps torch's message under the operator's name, without the
// places in headers that the stable ABI reports instead.
template <class F>
auto named(const char* op, const F& f) {
  try {
    return f();
  } catch (const Refusal&) {
    throw;
  } catch (const std::exception& error) {
    std::string what = error.what();
    if (what.find("API call failed at") != std::string::npos) {
      what = torch_exception_get_what_without_backtrace
                 ? torch_exception_get_what_without_backtrace()
                 : "torch failed, and before torch 2.13 it says why on stderr only";
    }
    throw std::runtime_error("c3a." + std::string(op) + ": " + what);
  }
}

}  // namespace c3a
