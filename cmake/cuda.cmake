# The CUDA library, where nvcc and cufft.h are found. cufft.h comes with the toolkit or with the
# wheel nvidia-cufft that a CUDA torch brings along (site-packages/nvidia/cu13/include).

set(C3A_CUDA_FACTS "")
set(_want_cuda OFF)
if(NOT C3A_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  find_path(C3A_CUFFT_INCLUDE cufft.h
    HINTS "${C3A_TORCH_ROOT}/../nvidia/cu13/include" /usr/local/cuda/include
    PATH_SUFFIXES targets/x86_64-linux/include)
  if(CMAKE_CUDA_COMPILER AND C3A_CUFFT_INCLUDE)
    set(_want_cuda ON)
  elseif(C3A_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "C3A_CUDA=ON needs nvcc and cufft.h; found nvcc: ${CMAKE_CUDA_COMPILER}, "
      "cufft.h: ${C3A_CUFFT_INCLUDE}")
  endif()
endif()
message(STATUS "CUDA library: ${_want_cuda}")

if(_want_cuda)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90-real 100-real 120)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  enable_language(CUDA)
  string(REGEX MATCH "^[0-9]+" _cuda_major "${CMAKE_CUDA_COMPILER_VERSION}")
  if(NOT _cuda_major EQUAL 13)
    message(FATAL_ERROR "c3a's CUDA library is built with CUDA 13, found ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()

  c3a_stand_in(stand_in_torch_cuda libtorch_cuda.so)
  c3a_stand_in(stand_in_cufft libcufft.so.12)
  c3a_stand_in(stand_in_cudart libcudart.so.13)

  # Its name carries the CUDA major, by which c3a/__init__.py chooses what to load.
  set(_library c3a_cuda${_cuda_major})
  add_library(${_library} MODULE cuda/cuda.cu)
  c3a_operator_library(${_library})
  target_compile_definitions(${_library} PRIVATE USE_CUDA)
  target_compile_options(${_library} PRIVATE
    -Xfatbin=-compress-all -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror)
  # The cuFFT wheel's headers lie beside a copy of the runtime's: after nvcc's own.
  target_include_directories(${_library} PRIVATE cpp)
  target_include_directories(${_library} SYSTEM PRIVATE "${C3A_CUFFT_INCLUDE}")
  target_link_libraries(${_library} PRIVATE stand_in_torch_cuda stand_in_cufft stand_in_cudart)

  string(REPLACE ";" " " _architectures "${CMAKE_CUDA_ARCHITECTURES}")
  set(C3A_CUDA_FACTS
    C3A_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" C3A_CUDA_ARCHITECTURES="${_architectures}")
endif()
