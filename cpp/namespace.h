// The operators' namespace in torch.ops: c3a, but in copies that live beside that one
// (build_support/hub.py).

#pragma once

#include <torch/csrc/stable/library.h>

#ifndef C3A_NAMESPACE
#define C3A_NAMESPACE c3a
#endif

// torch's macros paste the name as it stands; through this one they get its value.
#define C3A_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define C3A_LIBRARY(m) C3A_EXPANDED(STABLE_TORCH_LIBRARY, C3A_NAMESPACE, m)
#define C3A_LIBRARY_IMPL(key, m) C3A_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, C3A_NAMESPACE, key, m)
