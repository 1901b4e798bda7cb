#include "cuda_controls.h"

extern "C" c3a::CudaControls** c3a_cuda_controls() {
  static c3a::CudaControls* controls = nullptr;
  return &controls;
}
