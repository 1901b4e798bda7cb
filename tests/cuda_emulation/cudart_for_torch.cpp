// The rest of the CUDA runtime that a CUDA build of torch calls: loaded before libcudart, it gives
// an unmodified torch two devices in the host's memory. torch's own device functions cannot run: a
// launch of one is an error (driverless.py keeps them from being launched).

#include <cuda.h>
#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "device.h"

#define C3A_DOUBLE extern "C" C3A_EMULATION_EXPORT

using namespace c3a::emulation;

namespace {

std::recursive_mutex mutex;

// Never destroyed: libraries unload after static objects are gone.
std::map<const void*, std::string>& names() {
  static auto* const map = new std::map<const void*, std::string>;
  return *map;
}

struct Allocation {
  size_t bytes;
  int device;
};
std::map<char*, Allocation>& allocations() {
  static auto* const map = new std::map<char*, Allocation>;
  return *map;
}

struct Configuration {
  dim3 grid, threads;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local Configuration configuration;

cudaError_t foreign_launch(const void* function) {
  const std::lock_guard lock(mutex);
  const auto name = names().find(function);
  std::fprintf(
      stderr, "CUDA emulation: torch's own device function was launched: %s\n",
      name == names().end() ? "unregistered" : name->second.c_str());
  set_error(cudaErrorNotSupported);
  return cudaErrorNotSupported;
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes + (bytes == 0)) != 0) return nullptr;
  std::memset(memory, 0xff, bytes);  // NaNs
  return memory;
}

uintptr_t next_handle() {
  static uintptr_t handles = 0;
  const std::lock_guard lock(mutex);
  return ++handles;
}

CUresult primary_context_state(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult nothing() { return CUDA_SUCCESS; }

}  // namespace

// Registration of device functions, and launches

C3A_DOUBLE void** __cudaRegisterFatBinary(void*) {
  static void* handle[8];
  return handle;
}
C3A_DOUBLE void __cudaRegisterFatBinaryEnd(void**) {}
C3A_DOUBLE void __cudaUnregisterFatBinary(void**) {}
C3A_DOUBLE void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  const std::lock_guard lock(mutex);
  names()[function] = name;
}
C3A_DOUBLE void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
C3A_DOUBLE char __cudaInitModule(void**) { return 0; }
C3A_DOUBLE unsigned __cudaPushCallConfiguration(
    dim3 grid, dim3 threads, size_t shared_bytes, CUstream_st* stream) {
  configuration = {grid, threads, shared_bytes, stream};
  return 0;
}
C3A_DOUBLE cudaError_t
__cudaPopCallConfiguration(dim3* grid, dim3* threads, size_t* shared_bytes, void* stream) {
  *grid = configuration.grid;
  *threads = configuration.threads;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t
cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) {
  return foreign_launch(function);
}
C3A_DOUBLE cudaError_t
__cudaLaunchKernel(cudaKernel_t function, dim3, dim3, void**, size_t, cudaStream_t) {
  return foreign_launch(function);
}
C3A_DOUBLE cudaError_t
cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) {
  return foreign_launch(function);
}
C3A_DOUBLE cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

// Devices

C3A_DOUBLE cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "emulated device");
  cudaDeviceGetAttribute(&properties->major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&properties->minor, cudaDevAttrComputeCapabilityMinor, 0);
  properties->totalGlobalMem = 8ull << 30;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = shared_bytes_per_block();
  properties->sharedMemPerMultiprocessor = shared_bytes_per_block();
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->textureAlignment = 512;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* found) {
  const bool state = std::strstr(symbol, "PrimaryCtxGetState") != nullptr;
  *function =
      state ? reinterpret_cast<void*>(&primary_context_state) : reinterpret_cast<void*>(&nothing);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Memory

C3A_DOUBLE cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  *memory = allocate(bytes);
  if (!*memory) return cudaErrorMemoryAllocation;
  allocations()[static_cast<char*>(*memory)] = {bytes, current_device()};
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaFree(void* memory) {
  const std::lock_guard lock(mutex);
  if (memory && allocations().erase(static_cast<char*>(memory))) std::free(memory);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = allocate(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
C3A_DOUBLE cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = 7ull << 30;
  *total = 8ull << 30;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t
cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t
cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(mutex);
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->devicePointer = const_cast<void*>(pointer);
  auto after = allocations().upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (after != allocations().begin()) {
    const auto& [begin, allocation] = *--after;
    if (static_cast<const char*>(pointer) < begin + allocation.bytes) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->device = allocation.device;
    }
  }
  return cudaSuccess;
}

// Streams and events: work is done when it is enqueued.

namespace {
cudaError_t new_stream(cudaStream_t* stream) {
  const uintptr_t device = static_cast<uintptr_t>(current_device() + 1);
  *stream = reinterpret_cast<cudaStream_t>((device << 20) + 16 * next_handle());
  return cudaSuccess;
}
}  // namespace

C3A_DOUBLE cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream); }
C3A_DOUBLE cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return new_stream(stream);
}
C3A_DOUBLE cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return new_stream(stream);
}
C3A_DOUBLE cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return cudaStreamIsCapturing(stream, status);
}
C3A_DOUBLE cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(next_handle());
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaProfilerStart() { return cudaSuccess; }
C3A_DOUBLE cudaError_t cudaProfilerStop() { return cudaSuccess; }
