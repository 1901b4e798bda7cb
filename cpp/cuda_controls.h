// What c3a.cuda shows and sets of the CUDA library. That library may be absent: it puts its
// controls here when it is loaded, so that neither needs the other to load.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "facts.h"

namespace c3a {

struct PlanFacts {
  int device;
  int64_t length, batch;
  std::string transform;  // "R2C", "C2R", "D2Z" or "Z2D"
  bool captured;          // in a CUDA graph, which needs it: never evicted
};

struct PlanCacheFacts {
  int64_t capacity, hits, misses;
  std::vector<PlanFacts> plans;  // the most recently used first
};

class CudaControls {
 public:
  virtual PlanCacheFacts plan_cache() = 0;
  virtual void set_plan_cache_capacity(int64_t capacity) = 0;
  virtual void clear_plan_cache() = 0;

  // Bytes that the temporaries of a call's activations may take.
  virtual int64_t temporary_limit() = 0;
  virtual void set_temporary_limit(int64_t bytes) = 0;

  // "auto", "fused" or "cufft"
  virtual std::string path() = 0;
  virtual void set_path(const std::string& path) = 0;

 protected:
  ~CudaControls() = default;
};

}  // namespace c3a

// Where the controls are, in libc3a_cpu.so: null without the CUDA library.
C3A_EXPORT c3a::CudaControls** c3a_cuda_controls();

// The same for ctypes (python/c3a/cuda.py). Each returns null or what was wrong; texts last until
// the thread's next call. The cache's: "capacity hits misses", then a line for each plan, the most
// recently used first: "device length batch transform captured".
C3A_EXPORT const char* c3a_cuda_path(const char** path);
C3A_EXPORT const char* c3a_set_cuda_path(const char* path);
C3A_EXPORT const char* c3a_cuda_temporary_limit(int64_t* bytes);
C3A_EXPORT const char* c3a_set_cuda_temporary_limit(int64_t bytes);
C3A_EXPORT const char* c3a_cuda_plan_cache(const char** facts);
C3A_EXPORT const char* c3a_set_cuda_plan_cache_capacity(int64_t capacity);
C3A_EXPORT const char* c3a_clear_cuda_plan_cache();
