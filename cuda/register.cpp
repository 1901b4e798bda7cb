#include "cuda.h"

STABLE_TORCH_LIBRARY_IMPL(c3a, CUDA, m) { c3a::Operators<c3a::cuda::Cuda>::register_all(m); }
