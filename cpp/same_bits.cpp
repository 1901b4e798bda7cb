// By which a layer tells that its kernel is still what was prepared: memory is compared, whoever
// wrote it and however.

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "dispatch.h"

namespace {

bool same_bits(torch::stable::Tensor a, torch::stable::Tensor b) {
  const char* op = "_same_bits";
  return c3a::named(op, [&] {
    const bool comparable = a.is_contiguous() && b.is_contiguous() &&
                            a.numel() * a.element_size() == b.numel() * b.element_size();
    c3a::check(comparable, op, "expected two contiguous tensors of as many bytes");
    return a.numel() == 0 ||
           std::memcmp(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) == 0;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(c3a, CPU, m) { m.impl("_same_bits", TORCH_BOX(&same_bits)); }
