#include "cuda_controls.h"

#include <exception>
#include <sstream>
#include <stdexcept>

c3a::CudaControls** c3a_cuda_controls() {
  static c3a::CudaControls* controls = nullptr;
  return &controls;
}

namespace {

thread_local std::string error_text, result_text;

// Calls `use` with the CUDA library's controls; returns what it throws.
template <class Use>
const char* said_by(Use use) {
  try {
    c3a::CudaControls* controls = *c3a_cuda_controls();
    if (!controls) {
      throw std::runtime_error("c3a: the CUDA library is not loaded; `c3a info` tells why");
    }
    use(*controls);
    return nullptr;
  } catch (const std::exception& error) {
    error_text = error.what();
    return error_text.c_str();
  }
}

}  // namespace

const char* c3a_cuda_path(const char** path) {
  return said_by([=](c3a::CudaControls& controls) {
    result_text = controls.path();
    *path = result_text.c_str();
  });
}

const char* c3a_set_cuda_path(const char* path) {
  return said_by([=](c3a::CudaControls& controls) { controls.set_path(path); });
}

const char* c3a_cuda_temporary_limit(int64_t* bytes) {
  return said_by([=](c3a::CudaControls& controls) { *bytes = controls.temporary_limit(); });
}

const char* c3a_set_cuda_temporary_limit(int64_t bytes) {
  return said_by([=](c3a::CudaControls& controls) { controls.set_temporary_limit(bytes); });
}

const char* c3a_cuda_plan_cache(const char** facts) {
  return said_by([=](c3a::CudaControls& controls) {
    const c3a::PlanCacheFacts cache = controls.plan_cache();
    std::ostringstream text;
    text << cache.capacity << ' ' << cache.hits << ' ' << cache.misses;
    for (const c3a::PlanFacts& plan : cache.plans) {
      text << '\n'
           << plan.device << ' ' << plan.length << ' ' << plan.batch << ' ' << plan.transform << ' '
           << plan.captured;
    }
    result_text = text.str();
    *facts = result_text.c_str();
  });
}

const char* c3a_set_cuda_plan_cache_capacity(int64_t capacity) {
  return said_by([=](c3a::CudaControls& controls) { controls.set_plan_cache_capacity(capacity); });
}

const char* c3a_clear_cuda_plan_cache() {
  return said_by([](c3a::CudaControls& controls) { controls.clear_plan_cache(); });
}
