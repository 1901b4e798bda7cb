// c3a._C: what has no tensor in it. Everything else of the package works without this module.

#include <pybind11/pybind11.h>

#include "facts.h"

namespace py = pybind11;

extern "C" const char* c3a_cpu_capability();

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = c3a_version();
  info["compiler"] = c3a_compiler();
  info["torch_target"] = c3a_torch_target();
  info["cuda"] = py::none();
  if (c3a_cuda_version()) {
    py::dict cuda;
    cuda["version"] = c3a_cuda_version();
    cuda["architectures"] = c3a_cuda_architectures();
    info["cuda"] = cuda;
  }
  return info;
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
}
