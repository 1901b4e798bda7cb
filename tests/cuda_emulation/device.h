// The emulated machine, shared by the doubles of this folder: two devices whose memory is the
// host's.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "emulation.h"

namespace c3a::emulation {

constexpr int kDevices = 2;
constexpr int kMultiprocessors = 4;

[[noreturn]] void die(const std::string& what);

// The code that the test asked the next call of this name for, once; else success, zero.
int planned_failure(const char* call);

// The stream that work must be enqueued on: torch's current one.
cudaStream_t current_stream();
int current_device();
bool is_capturing(cudaStream_t stream);

// Dies unless `stream` is the current one, and of the current device.
void check_stream(const std::string& what, cudaStream_t stream);

int shared_bytes_per_block();  // what a device has
size_t allowed_shared_bytes(const void* function);
void set_error(cudaError_t error);    // for cudaGetLastError
void note(const std::string& event);  // for the test's log

}  // namespace c3a::emulation
