// The CUDA runtime's calls that the library makes, and what tests ask of the emulated machine.

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "device.h"

#define C3A_DOUBLE extern "C" C3A_EMULATION_EXPORT

namespace c3a::emulation {
namespace {

std::recursive_mutex mutex;
std::map<std::string, int> failures;
std::map<const void*, int> shared_limits;
std::set<cudaStream_t> capturing;
std::string events;
int capability = 90, shared_bytes = 227 << 10;
bool code_exists = true;
thread_local cudaError_t last_error = cudaSuccess;
thread_local int device = 0;
thread_local cudaStream_t stream = nullptr;

cudaError_t fail(cudaError_t error) { return last_error = error; }

#define C3A_MAY_FAIL(call)                       \
  if (const int code = planned_failure(call)) {  \
    return fail(static_cast<cudaError_t>(code)); \
  }

}  // namespace

int planned_failure(const char* call) {
  const std::lock_guard lock(mutex);
  const auto planned = failures.find(call);
  if (planned == failures.end()) return 0;
  const int code = planned->second;
  failures.erase(planned);
  return code;
}

int current_device() { return device; }

cudaStream_t current_stream() {
  // A CUDA build of torch knows; elsewhere the test says.
  using Source = int (*)(int32_t, void**);
  static const Source torchs = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Source>(symbol);
  }();
  if (!torchs) return stream;
  void* current = nullptr;
  if (torchs(device, &current) != 0) die("torch does not tell its current stream");
  return static_cast<cudaStream_t>(current);
}

bool is_capturing(cudaStream_t which) {
  const std::lock_guard lock(mutex);
  return capturing.count(which) > 0;
}

// A stream's handle tells its device: (device + 1) << 20 and more.
void check_stream(const std::string& what, cudaStream_t which) {
  if (which != current_stream()) die(what + " is not on the current stream");
  const auto handle = reinterpret_cast<uintptr_t>(which);
  if (handle != 0 && static_cast<int>(handle >> 20) != device + 1) {
    die(what + " is on a stream of another device");
  }
}

int shared_bytes_per_block() { return shared_bytes; }

size_t allowed_shared_bytes(const void* function) {
  constexpr int kAlways = 48 << 10;
  const std::lock_guard lock(mutex);
  const auto limit = shared_limits.find(function);
  return static_cast<size_t>(
      limit == shared_limits.end() ? kAlways : std::max(kAlways, limit->second));
}

void set_error(cudaError_t error) { last_error = error; }

void note(const std::string& event) {
  const std::lock_guard lock(mutex);
  events += event + '\n';
}

}  // namespace c3a::emulation

using namespace c3a::emulation;

// For tests, by ctypes.

C3A_DOUBLE void c3a_emulation_fail(const char* call, int code) {
  const std::lock_guard lock(mutex);
  failures[call] = code;
}
C3A_DOUBLE void c3a_emulation_use(int which, int number) {
  device = which;
  const uintptr_t handle = (static_cast<uintptr_t>(which + 1) << 20) + 16 * number;
  stream = number == 0 ? nullptr : reinterpret_cast<cudaStream_t>(handle);
}
C3A_DOUBLE void c3a_emulation_capture(int on) {
  const std::lock_guard lock(mutex);
  if (on) {
    capturing.insert(current_stream());
  } else {
    capturing.erase(current_stream());
  }
}
C3A_DOUBLE void c3a_emulation_device(int which_capability, int which_shared_bytes, int has_code) {
  capability = which_capability;
  shared_bytes = which_shared_bytes;
  code_exists = has_code != 0;
}
// Launches and cuFFT executions since the last call, one a line.
C3A_DOUBLE const char* c3a_emulation_events() {
  const std::lock_guard lock(mutex);
  static thread_local std::string taken;
  taken.clear();
  taken.swap(events);
  return taken.c_str();
}

// The runtime.

C3A_DOUBLE cudaError_t cudaGetDevice(int* which) {
  C3A_MAY_FAIL("cudaGetDevice");
  *which = device;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaSetDevice(int which) {
  if (which < 0 || which >= kDevices) return fail(cudaErrorInvalidDevice);
  device = which;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int which) {
  C3A_MAY_FAIL("cudaDeviceGetAttribute");
  if (which < 0 || which >= kDevices) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes; break;
    default: *value = 0; break;
  }
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t
cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  C3A_MAY_FAIL("cudaFuncSetAttribute");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > shared_bytes) {
    return fail(cudaErrorInvalidValue);
  }
  note("shared memory limit " + std::to_string(value));
  const std::lock_guard lock(mutex);
  shared_limits[function] = value;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  C3A_MAY_FAIL("cudaFuncGetAttributes");
  if (!code_exists) return fail(cudaErrorNoKernelImageForDevice);
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaStreamIsCapturing(cudaStream_t which, cudaStreamCaptureStatus* status) {
  C3A_MAY_FAIL("cudaStreamIsCapturing");
  *status = is_capturing(which) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}
C3A_DOUBLE cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
C3A_DOUBLE cudaError_t cudaPeekAtLastError() { return last_error; }
C3A_DOUBLE const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    default: return "cudaErrorUnknown";
  }
}
C3A_DOUBLE const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
