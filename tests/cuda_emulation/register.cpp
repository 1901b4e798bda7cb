// The CUDA back end in place of the CPU's, for a torch without CUDA: CPU tensors stand for CUDA's.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../../cpp/cuda_controls.h"
#include "../../cuda/cuda.h"
#include "device.h"

// torch's, here the emulated machine's: the library finds these before torch's own.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = c3a::emulation::current_stream();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

C3A_EMULATION_EXPORT const char* c3a_cpu_capability() { return "cuda-emulated"; }
}

C3A_LIBRARY_IMPL(CPU, m) { c3a::Operators<c3a::cuda::Cuda>::register_all(m); }
