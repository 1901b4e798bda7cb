#include "cuda.h"

C3A_LIBRARY_IMPL(CUDA, m) { c3a::Operators<c3a::cuda::Cuda>::register_all(m); }
