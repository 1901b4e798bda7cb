# The CUDA sources through g++, on an emulated machine: no GPU, no nvcc. C3A_EMULATE_CUDA=CPU puts them
# and the machine into libc3a_cpu.so, where CPU tensors stand for CUDA's: no CUDA build of torch.
# C3A_EMULATE_CUDA=TORCH makes libc3a_cuda13.so of them, and libc3a_emulation.so of the machine, which
# a CUDA build of torch runs on too if it is loaded before everything (driverless.py). The
# toolkit's headers come from where nvcc is or from the wheels nvidia-cuda-runtime, nvidia-cuda-crt
# and nvidia-cufft, which all lie in one folder.

set(_emulation "${CMAKE_CURRENT_LIST_DIR}")
find_path(C3A_CUDA_INCLUDE cuda_runtime.h
  HINTS "${C3A_TORCH_ROOT}/../nvidia/cu13/include" /usr/local/cuda/include)
include(build_support/cufft.cmake)
if(NOT C3A_CUDA_INCLUDE OR NOT C3A_CUFFT_INCLUDE)
  message(FATAL_ERROR
    "the emulation needs CUDA's headers: cuda_runtime.h in ${C3A_CUDA_INCLUDE}, cufft.h in "
    "${C3A_CUFFT_INCLUDE}")
endif()

# The doubles are instrumented for addresses but not for threads: fibers are told to the sanitizer
# by hand. emulation.cpp, which switches stacks, is not instrumented at all.
set(_doubles "${_emulation}/cudart.cpp" "${_emulation}/cufft.cpp")
set(C3A_CUDA_SOURCES cuda/spectral.cu cuda/fused.cu cuda/cuda.cpp cuda/plans.cpp)
set_source_files_properties(cuda/spectral.cu cuda/fused.cu PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-include;${_emulation}/emulation.h")
add_library(c3a_emulation OBJECT "${_emulation}/emulation.cpp" ${_doubles})
add_library(c3a_emulated_cuda OBJECT ${C3A_CUDA_SOURCES})
foreach(_target c3a_emulation c3a_emulated_cuda)
  target_include_directories(${_target} PRIVATE "${_emulation}")
  target_include_directories(${_target} SYSTEM PRIVATE
    "${C3A_CUDA_INCLUDE}" "${C3A_CUFFT_INCLUDE}" "${C3A_TORCH_ROOT}/include")
  target_compile_definitions(${_target} PRIVATE
    USE_CUDA TORCH_TARGET_VERSION=${C3A_TORCH_TARGET} C3A_CUDA_ARCHITECTURES="an emulated machine")
  target_compile_options(${_target} PRIVATE ${C3A_WARNINGS} -Wno-unknown-pragmas -O1 -g1)
endforeach()
target_compile_options(c3a_emulated_cuda PRIVATE ${C3A_SANITIZE_OPTIONS})
if(C3A_SANITIZE STREQUAL "address")
  set_source_files_properties(${_doubles} PROPERTIES COMPILE_OPTIONS "${C3A_SANITIZE_OPTIONS}")
  target_compile_definitions(c3a_emulation PRIVATE C3A_EMULATION_ADDRESS_SANITIZER)
elseif(C3A_SANITIZE STREQUAL "thread")
  target_compile_definitions(c3a_emulation PRIVATE C3A_EMULATION_THREAD_SANITIZER)
endif()

if(C3A_EMULATE_CUDA STREQUAL "CPU")
  target_sources(c3a_cpu PRIVATE "${_emulation}/register.cpp"
    $<TARGET_OBJECTS:c3a_emulation> $<TARGET_OBJECTS:c3a_emulated_cuda>)
  target_compile_definitions(c3a_cpu PRIVATE USE_CUDA)
  target_include_directories(c3a_cpu SYSTEM PRIVATE "${C3A_CUDA_INCLUDE}")
elseif(C3A_EMULATE_CUDA STREQUAL "TORCH")
  target_sources(c3a_emulation PRIVATE "${_emulation}/cudart_for_torch.cpp")
  add_library(c3a_emulation_library SHARED $<TARGET_OBJECTS:c3a_emulation>)
  set_target_properties(c3a_emulation_library PROPERTIES OUTPUT_NAME c3a_emulation)
  install(TARGETS c3a_emulation_library LIBRARY DESTINATION c3a)
  c3a_stand_in(stand_in_torch_cuda libtorch_cuda.so)
  add_library(c3a_cuda13 MODULE $<TARGET_OBJECTS:c3a_emulated_cuda> cuda/register.cpp)
  c3a_operator_library(c3a_cuda13)
  target_link_libraries(c3a_cuda13 PRIVATE c3a_cpu stand_in_torch_cuda)
else()
  message(FATAL_ERROR "C3A_EMULATE_CUDA is OFF, CPU or TORCH; got ${C3A_EMULATE_CUDA}")
endif()
