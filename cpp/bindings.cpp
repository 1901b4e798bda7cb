// c3a._C: what has no tensor in it. Everything else of the package works without this module.

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda_controls.h"

namespace py = pybind11;

extern "C" const char* c3a_cpu_capability();

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = C3A_VERSION;
  info["compiler"] = C3A_COMPILER;
  info["torch_target"] = C3A_TORCH_TARGET_TEXT;
  info["cuda"] = py::none();
#ifdef C3A_CUDA_VERSION
  py::dict cuda;
  cuda["version"] = C3A_CUDA_VERSION;
  cuda["architectures"] = C3A_CUDA_ARCHITECTURES;
  info["cuda"] = cuda;
#endif
  return info;
}

c3a::CudaControls& cuda() {
  if (c3a::CudaControls* controls = *c3a_cuda_controls()) return *controls;
  throw std::runtime_error(
      "c3a: the CUDA library is not loaded; `c3a info` tells why (c3a._library.cuda_library)");
}

py::dict plan_cache() {
  const c3a::PlanCacheFacts facts = cuda().plan_cache();
  py::list plans;
  for (const c3a::PlanFacts& plan : facts.plans) {
    py::dict entry;
    entry["device"] = plan.device;
    entry["length"] = plan.length;
    entry["batch"] = plan.batch;
    entry["transform"] = plan.transform;
    entry["captured"] = plan.captured;
    plans.append(entry);
  }
  py::dict cache;
  cache["capacity"] = facts.capacity;
  cache["hits"] = facts.hits;
  cache["misses"] = facts.misses;
  cache["plans"] = plans;
  return cache;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Facts of this build and this machine.";
  m.def(
      "build_info", &build_info,
      "Return version, compiler, the oldest torch that the libraries load in, and the CUDA version "
      "and architectures (None without CUDA).");
  m.def(
      "cpu_capability", [] { return c3a_cpu_capability(); },
      "Return the instruction-set level in use, for instance 'x86-64-v3'.");

  // The CUDA library's; RuntimeError without it.
  m.def(
      "cuda_plan_cache", &plan_cache,
      "Return the cache of cuFFT plans: capacity, hits, misses, and plans, the most recently used "
      "first, each with device, length, batch, transform and whether a CUDA graph captured it.");
  m.def(
      "set_cuda_plan_cache_capacity",
      [](int64_t capacity) { cuda().set_plan_cache_capacity(capacity); }, py::arg("capacity"),
      "Keep at most `capacity` plans (at first C3A_CUDA_PLANS, or 64); captured ones always stay.");
  m.def(
      "clear_cuda_plan_cache", [] { cuda().clear_plan_cache(); },
      "Drop all plans but captured ones.");
  m.def(
      "cuda_temporary_limit", [] { return cuda().temporary_limit(); },
      "Return how many bytes the temporaries of a call's activations may take on cuFFT's path.");
  m.def(
      "set_cuda_temporary_limit", [](int64_t bytes) { cuda().set_temporary_limit(bytes); },
      py::arg("bytes"),
      "Set that limit (at first C3A_CUDA_TEMPORARY_MIB, or 256 MiB): tokens go in chunks that fit.");
  m.def(
      "cuda_path", [] { return cuda().path(); },
      "Return how forward and input gradient choose their path: 'auto', 'fused' or 'cufft'.");
  m.def(
      "set_cuda_path", [](const std::string& path) { cuda().set_path(path); }, py::arg("path"),
      "Set that choice (at first C3A_CUDA_PATH, or 'auto'). 'fused' means wherever that path exists.");
}
