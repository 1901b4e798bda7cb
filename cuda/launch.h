// How device functions are launched and CUDA's calls checked: in one place, so that a test build
// can put something else under them by defining C3A_LAUNCH and C3A_SHARED first.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

#ifndef C3A_LAUNCH
// All shared memory is dynamic.
#define C3A_SHARED(T, name)                                                \
  extern __shared__ __align__(16) unsigned char c3a_shared_memory_bytes[]; \
  T* const name = reinterpret_cast<T*>(c3a_shared_memory_bytes)
#define C3A_LAUNCH(function, grid, threads, shared_bytes, stream, ...)        \
  do {                                                                        \
    (function)<<<(grid), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::c3a::cuda::check_cuda(cudaGetLastError(), "launch of " #function);      \
  } while (0)
#endif

#define C3A_CUDA_CHECK(call) ::c3a::cuda::check_cuda((call), #call)

namespace c3a::cuda {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // takes the error back: the next launch is not to be blamed for it
  std::ostringstream message;
  message << call << " failed: " << cudaGetErrorName(error) << ", " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

constexpr int kThreads = 256;

// Shared memory beyond what every launch may have must be asked for. Always for the most that the
// device gives: another thread may be about to launch the same function with more than this one.
template <class Function>
void allow_shared_memory(Function* function, size_t bytes, int64_t most) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  C3A_CUDA_CHECK(cudaFuncSetAttribute(
      reinterpret_cast<const void*>(function), cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(most)));
}

}  // namespace c3a::cuda
