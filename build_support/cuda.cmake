# The CUDA library, where nvcc and cufft.h are found.

set(C3A_CUDA_FACTS "")
set(_want_cuda OFF)
if(NOT C3A_CUDA STREQUAL "OFF")
  include(build_support/cufft.cmake)
  # nvcc comes with the toolkit, or as the wheel nvidia-cuda-nvcc beside torch's own CUDA libraries.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(C3A_NVCC nvcc
      HINTS "${C3A_TORCH_ROOT}/../nvidia/cu13/bin" PATHS /usr/local/cuda/bin)
    if(C3A_NVCC)
      set(CMAKE_CUDA_COMPILER "${C3A_NVCC}")
      # The wheel's nvcc does not look for the libraries that CMake tries it with where they are.
      cmake_path(GET C3A_NVCC PARENT_PATH _nvcc_folder)
      set(ENV{LIBRARY_PATH} "${_nvcc_folder}/../lib:$ENV{LIBRARY_PATH}")
    endif()
  endif()
  check_language(CUDA)
  set(_nvcc_version "none")
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE _nvcc_version)
    string(REGEX REPLACE ".*release ([0-9.]+).*" "\\1" _nvcc_version "${_nvcc_version}")
  endif()
  # By nvcc's major: what cuFFT's and the runtime's libraries are called.
  string(REGEX REPLACE "\\..*" "" _major "${_nvcc_version}")
  set(_cufft_of_12 11)
  set(_cufft_of_13 12)
  if(_cufft_of_${_major} AND _nvcc_version VERSION_GREATER_EQUAL 12.8 AND C3A_CUFFT_INCLUDE)
    set(_want_cuda ON)
    if(C3A_TORCH_CUDA AND NOT C3A_TORCH_CUDA MATCHES "^${_major}\\.")
      message(WARNING
        "this torch is built for CUDA ${C3A_TORCH_CUDA} and will not load the CUDA library of nvcc "
        "${_nvcc_version}: on a GPU c3a will be several times slower. Set CUDACXX to an nvcc of "
        "torch's major, or install a torch built for CUDA ${_major}")
    endif()
  else()
    string(CONCAT _lacks
      "needs nvcc 13, or 12.8 or newer, and cufft.h; found nvcc: ${_nvcc_version}, cufft.h: "
      "${C3A_CUFFT_INCLUDE}")
    if(C3A_CUDA STREQUAL "ON")
      message(FATAL_ERROR "C3A_CUDA=ON ${_lacks}")
    elseif(EXISTS "${C3A_TORCH_ROOT}/lib/libtorch_cuda.so")
      message(WARNING
        "this torch has CUDA, but c3a is built without: its CUDA library ${_lacks}. On a GPU it will "
        "be several times slower. README, \"CUDA\", has the commands")
    endif()
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

  c3a_stand_in(stand_in_torch_cuda libtorch_cuda.so)
  c3a_stand_in(stand_in_cufft libcufft.so.${_cufft_of_${_major}})
  c3a_stand_in(stand_in_cudart libcudart.so.${_major})

  # Its name carries the CUDA major, by which c3a/_library.py chooses what to load.
  set(_cuda c3a_cuda${_major})
  add_library(${_cuda} MODULE
    cuda/spectral.cu cuda/fused.cu cuda/cuda.cpp cuda/plans.cpp cuda/register.cpp)
  c3a_operator_library(${_cuda})
  string(REPLACE ";" " " _architectures "${CMAKE_CUDA_ARCHITECTURES}")
  target_compile_definitions(${_cuda} PRIVATE
    USE_CUDA C3A_CUDA_ARCHITECTURES="${_architectures}")
  list(JOIN C3A_WARNINGS "," _nvcc_warnings)
  set(_nvcc_warnings "-Xcompiler=${_nvcc_warnings}")
  if(C3A_WERROR)
    list(APPEND _nvcc_warnings -Werror=all-warnings)
  endif()
  target_compile_options(${_cuda} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all ${_nvcc_warnings}>
    $<$<COMPILE_LANGUAGE:CXX>:${C3A_WARNINGS}>)
  # The cuFFT wheel's headers lie beside a copy of the runtime's: after nvcc's own.
  target_include_directories(${_cuda} SYSTEM PRIVATE
    ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} "${C3A_CUFFT_INCLUDE}")
  # Its controls go to where c3a.cuda finds them.
  target_link_libraries(${_cuda} PRIVATE
    c3a_cpu stand_in_torch_cuda stand_in_cufft stand_in_cudart)

  set(C3A_CUDA_FACTS
    C3A_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" C3A_CUDA_ARCHITECTURES="${_architectures}")
endif()
