#include "plans.h"

#include <sstream>
#include <stdexcept>

#include "launch.h"

namespace c3a::cuda {
namespace {

const char* name(cufftResult result) {
  switch (result) {
    case CUFFT_SUCCESS: return "CUFFT_SUCCESS";
    case CUFFT_INVALID_PLAN: return "CUFFT_INVALID_PLAN";
    case CUFFT_ALLOC_FAILED: return "CUFFT_ALLOC_FAILED";
    case CUFFT_INVALID_TYPE: return "CUFFT_INVALID_TYPE";
    case CUFFT_INVALID_VALUE: return "CUFFT_INVALID_VALUE";
    case CUFFT_INTERNAL_ERROR: return "CUFFT_INTERNAL_ERROR";
    case CUFFT_EXEC_FAILED: return "CUFFT_EXEC_FAILED";
    case CUFFT_SETUP_FAILED: return "CUFFT_SETUP_FAILED";
    case CUFFT_INVALID_SIZE: return "CUFFT_INVALID_SIZE";
    case CUFFT_INVALID_DEVICE: return "CUFFT_INVALID_DEVICE";
    case CUFFT_NO_WORKSPACE: return "CUFFT_NO_WORKSPACE";
    case CUFFT_NOT_IMPLEMENTED: return "CUFFT_NOT_IMPLEMENTED";
    case CUFFT_NOT_SUPPORTED: return "CUFFT_NOT_SUPPORTED";
    default: return "an unknown cuFFT error";
  }
}

const char* name(cufftType type) {
  switch (type) {
    case CUFFT_R2C: return "R2C";
    case CUFFT_C2R: return "C2R";
    case CUFFT_D2Z: return "D2Z";
    case CUFFT_Z2D: return "Z2D";
    default: return "an unknown transform";
  }
}

std::string describe(const PlanKey& key) {
  std::ostringstream text;
  text << key.batch << ' ' << name(key.type) << " transforms of length " << key.length
       << " on cuda:" << key.device;
  return text.str();
}

void check_cufft(cufftResult result, const char* call, const PlanKey& key) {
  if (result == CUFFT_SUCCESS) return;
  std::ostringstream message;
  message << call << " failed for " << describe(key) << ": " << name(result);
  throw std::runtime_error(message.str());
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C3A_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Making and destroying a plan allocates and frees: allowed by this while another thread captures a
// graph, which does not concern it.
class WhileOthersCapture {
 public:
  WhileOthersCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileOthersCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  WhileOthersCapture(const WhileOthersCapture&) = delete;
  WhileOthersCapture& operator=(const WhileOthersCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

Plan::Plan(const PlanKey& key) : key_(key) {
  const WhileOthersCapture relaxed;
  long long length = key.length, reals = key.length, bins = key.length / 2 + 1;
  check_cufft(cufftCreate(&handle_), "cufftCreate", key);
  try {
    check_cufft(cufftSetAutoAllocation(handle_, 0), "cufftSetAutoAllocation", key);
    const bool forward = key.type == CUFFT_R2C || key.type == CUFFT_D2Z;
    const cufftResult made =
        forward ? cufftMakePlanMany64(
                      handle_, /* rank= */ 1, &length, &reals, /* istride= */ 1,
                      /* idist= */ key.length, &bins, /* ostride= */ key.batch, /* odist= */ 1,
                      key.type, key.batch, &workspace_bytes_)
                : cufftMakePlanMany64(
                      handle_, /* rank= */ 1, &length, &bins, /* istride= */ key.batch,
                      /* idist= */ 1, &reals, /* ostride= */ 1, /* odist= */ key.length, key.type,
                      key.batch, &workspace_bytes_);
    check_cufft(made, "cufftMakePlanMany64", key);
  } catch (...) {
    cufftDestroy(handle_);
    throw;
  }
}

Plan::~Plan() {
  const WhileOthersCapture relaxed;
  cufftDestroy(handle_);
}

void Plan::execute(void* in, void* out, void* workspace, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  check_cufft(cufftSetStream(handle_, stream), "cufftSetStream", key_);
  check_cufft(cufftSetWorkArea(handle_, workspace), "cufftSetWorkArea", key_);
  cufftResult result = CUFFT_INVALID_TYPE;
  switch (key_.type) {
    case CUFFT_R2C:
      result = cufftExecR2C(handle_, static_cast<float*>(in), static_cast<cufftComplex*>(out));
      break;
    case CUFFT_C2R:
      result = cufftExecC2R(handle_, static_cast<cufftComplex*>(in), static_cast<float*>(out));
      break;
    case CUFFT_D2Z:
      result =
          cufftExecD2Z(handle_, static_cast<double*>(in), static_cast<cufftDoubleComplex*>(out));
      break;
    case CUFFT_Z2D:
      result =
          cufftExecZ2D(handle_, static_cast<cufftDoubleComplex*>(in), static_cast<double*>(out));
      break;
    default: break;
  }
  check_cufft(result, "cufftExec", key_);
}

std::shared_ptr<Plan> PlanCache::get(const PlanKey& key, cudaStream_t stream) {
  const bool captured = is_captured(stream);
  std::list<Entry> evicted;  // destroyed after the lock is released
  const std::lock_guard lock(mutex_);
  const auto place = places_.find(key);
  if (place != places_.end()) {
    ++hits_;
    entries_.splice(entries_.begin(), entries_, place->second);
  } else {
    if (captured) {
      throw std::runtime_error(
          "a plan for " + describe(key) +
          " is needed while a CUDA graph is captured, and cuFFT cannot make one then: run the "
          "operator once at this shape before the capture, and have room for all plans "
          "(C3A_CUDA_PLANS, " +
          std::to_string(capacity_) + " now)");
    }
    ++misses_;
    entries_.push_front({key, std::make_shared<Plan>(key)});
    places_[key] = entries_.begin();
  }
  const std::shared_ptr<Plan> plan = entries_.front().plan;
  if (captured) plan->captured = true;
  if (!captured) evicted = evict_to(capacity_);
  return plan;
}

std::list<PlanCache::Entry> PlanCache::evict_to(int64_t capacity) {
  std::list<Entry> evicted;
  auto entry = entries_.end();
  while (static_cast<int64_t>(entries_.size()) > capacity && entry != entries_.begin()) {
    --entry;
    if (entry->plan->captured) continue;
    places_.erase(entry->key);
    const auto gone = entry++;
    evicted.splice(evicted.begin(), entries_, gone);
  }
  return evicted;
}

PlanCacheFacts PlanCache::facts() {
  const std::lock_guard lock(mutex_);
  PlanCacheFacts facts{capacity_, hits_, misses_, {}};
  for (const auto& [key, plan] : entries_) {
    facts.plans.push_back({key.device, key.length, key.batch, name(key.type), plan->captured});
  }
  return facts;
}

void PlanCache::set_capacity(int64_t capacity) {
  if (capacity < 1) {
    throw std::runtime_error(
        "c3a: expected a plan cache capacity >= 1, got " + std::to_string(capacity));
  }
  std::list<Entry> evicted;
  const std::lock_guard lock(mutex_);
  capacity_ = capacity;
  evicted = evict_to(capacity_);
}

void PlanCache::clear() {
  std::list<Entry> evicted;
  const std::lock_guard lock(mutex_);
  evicted = evict_to(0);
}

}  // namespace c3a::cuda
