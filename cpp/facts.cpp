#include "facts.h"

#include <exception>
#include <string>

extern "C" const char* c3a_cpu_capability();

const char* c3a_version() { return C3A_VERSION; }
const char* c3a_compiler() { return C3A_COMPILER; }
const char* c3a_torch_target() { return C3A_TORCH_TARGET_TEXT; }
#ifdef C3A_CUDA_VERSION
const char* c3a_cuda_version() { return C3A_CUDA_VERSION; }
const char* c3a_cuda_architectures() { return C3A_CUDA_ARCHITECTURES; }
#else
const char* c3a_cuda_version() { return nullptr; }
const char* c3a_cuda_architectures() { return nullptr; }
#endif

const char* c3a_cpu_level(const char** level) try {
  *level = c3a_cpu_capability();
  return nullptr;
} catch (const std::exception& error) {
  static thread_local std::string text;
  text = error.what();
  return text.c_str();
}
