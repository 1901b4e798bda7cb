// Facts of this build, as C functions of libc3a_cpu.so, for c3a._C and, without it, for ctypes.

#pragma once

#define C3A_EXPORT extern "C" __attribute__((visibility("default")))

C3A_EXPORT const char* c3a_version();
C3A_EXPORT const char* c3a_compiler();
C3A_EXPORT const char* c3a_torch_target();  // the oldest torch
C3A_EXPORT const char* c3a_cuda_version();  // null without CUDA, as the next
C3A_EXPORT const char* c3a_cuda_architectures();

// The instruction-set level in use; returns null, or what is wrong with C3A_CPU_LEVEL.
C3A_EXPORT const char* c3a_cpu_level(const char** level);
