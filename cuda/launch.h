// How device functions are launched, and how every CUDA call is checked: in one place, so that a
// test build can put something else under them.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

#define C3A_CUDA_CHECK(call) ::c3a::check_cuda((call), #call)
#define C3A_LAUNCH(function, grid, threads, stream, ...)           \
  do {                                                             \
    (function)<<<(grid), (threads), 0, (stream)>>>(__VA_ARGS__);   \
    ::c3a::check_cuda(cudaGetLastError(), "launch of " #function); \
  } while (0)

namespace c3a {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << "c3a: " << call << " failed: " << cudaGetErrorName(error) << ", "
          << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

constexpr int kThreads = 256;

// Device functions walk over their elements with a stride of the whole grid.
inline unsigned grid_for(int64_t elements) {
  constexpr int64_t kMaxGrid = 65535;
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

}  // namespace c3a
