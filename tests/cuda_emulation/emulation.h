// CUDA device code on the CPU, for tests: included before every .cu file when g++ compiles it. Each
// CUDA thread is a fiber with a stack of its own; a barrier switches to the next one. The threads
// of a thread block run in an order that C3A_EMULATION_SEED permutes; thread blocks run one after
// another. Shared memory starts as NaNs and has exactly the size that the launch asked for.
//
// Not seen this way: races between thread blocks, the order of streams, time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <functional>

#undef __launch_bounds__
#undef __restrict__
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define C3A_EMULATION_EXPORT __attribute__((visibility("default")))

namespace c3a::emulation {

// What the running CUDA thread sees.
struct Running {
  dim3 thread_index, block_index, block_size, grid_size;
  unsigned char* shared_memory;
};
C3A_EMULATION_EXPORT extern Running running;

C3A_EMULATION_EXPORT void barrier(const char* place);

// Runs `thread` once for every CUDA thread of the grid. A launch that CUDA would refuse sets
// cudaGetLastError and runs nothing.
C3A_EMULATION_EXPORT void launch(
    const char* name, const void* function, dim3 grid, dim3 threads, size_t shared_bytes,
    cudaStream_t stream, const std::function<void()>& thread);

template <class Function, class... Args>
void launch(
    const char* name, Function* function, dim3 grid, dim3 threads, size_t shared_bytes,
    cudaStream_t stream, Args... args) {
  launch(
      name, reinterpret_cast<const void*>(function), grid, threads, shared_bytes, stream,
      std::function<void()>([=] { function(args...); }));
}

}  // namespace c3a::emulation

#define threadIdx (::c3a::emulation::running.thread_index)
#define blockIdx (::c3a::emulation::running.block_index)
#define blockDim (::c3a::emulation::running.block_size)
#define gridDim (::c3a::emulation::running.grid_size)

#define C3A_EMULATION_TEXT_(x) #x
#define C3A_EMULATION_TEXT(x) C3A_EMULATION_TEXT_(x)
#define __syncthreads() ::c3a::emulation::barrier(__FILE__ ":" C3A_EMULATION_TEXT(__LINE__))

inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed = 2 * reversed + (value >> bit & 1);
  return reversed;
}

inline void __stwb(uint4* p, uint4 value) { *p = value; }

#define C3A_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::c3a::emulation::running.shared_memory)
#define C3A_LAUNCH(function, grid, threads, shared_bytes, stream, ...)                    \
  do {                                                                                    \
    ::c3a::emulation::launch(                                                             \
        #function, (function), (grid), (threads), (shared_bytes), (stream), __VA_ARGS__); \
    ::c3a::cuda::check_cuda(cudaGetLastError(), "launch of " #function);                  \
  } while (0)
