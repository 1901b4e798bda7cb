// Batched real transforms by cuFFT, spectra laid out bin by bin: element k of transform t lies at
// k * batch + t, so that one bin of all transforms is a dense matrix.
//
// Plans are kept: the least recently used ones beyond the capacity are dropped, but for those that
// a CUDA graph captured, which replays what they point to.

#pragma once

#include <cufft.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "../cpp/cuda_controls.h"
#include "kernels.h"

namespace c3a::cuda {

struct PlanKey {
  int device;  // the current one
  int64_t length, batch;
  cufftType type;
  auto operator<=>(const PlanKey&) const = default;
};

// Executed by one thread at a time. The caller gives the workspace, which belongs to that
// execution's stream; so executions on several streams do not meet.
class Plan {
 public:
  explicit Plan(const PlanKey& key);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  size_t workspace_bytes() const { return workspace_bytes_; }

  // `in` and `out` aligned to a complex number; an inverse transform overwrites `in`.
  void execute(void* in, void* out, void* workspace, cudaStream_t stream);

  std::atomic<bool> captured = false;

 private:
  const PlanKey key_;
  std::mutex mutex_;
  cufftHandle handle_ = 0;
  size_t workspace_bytes_ = 0;
};

class PlanCache {
 public:
  explicit PlanCache(int64_t capacity) : capacity_(capacity) {}

  // The plan, made at first use, for execution on `stream`. Throws if it has to be made while the
  // stream is being captured, which cuFFT does not allow.
  std::shared_ptr<Plan> get(const PlanKey& key, cudaStream_t stream);

  PlanCacheFacts facts();
  void set_capacity(int64_t capacity);
  void clear();  // but for captured plans

 private:
  struct Entry {
    PlanKey key;
    std::shared_ptr<Plan> plan;
  };
  // What was taken out; destroying a plan may wait for the device.
  std::list<Entry> evict_to(int64_t capacity);

  std::mutex mutex_;
  int64_t capacity_, hits_ = 0, misses_ = 0;
  std::list<Entry> entries_;  // the most recently used first
  std::map<PlanKey, std::list<Entry>::iterator> places_;
};

template <class Real>
constexpr cufftType kForward = std::is_same_v<Real, double> ? CUFFT_D2Z : CUFFT_R2C;
template <class Real>
constexpr cufftType kInverse = std::is_same_v<Real, double> ? CUFFT_Z2D : CUFFT_C2R;

}  // namespace c3a::cuda
