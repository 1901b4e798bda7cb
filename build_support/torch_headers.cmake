# Operator libraries on the LibTorch stable ABI: torch's headers and nothing else of it. No
# find_package(Torch), no import of torch, no Python in the libraries; one binary for every torch
# from the target on.

set(C3A_TORCH_TARGET_TEXT 2.10)
set(C3A_TORCH_TARGET 0x020a000000000000ULL)

if(NOT C3A_TORCH_ROOT)
  set(C3A_TORCH_ROOT "$ENV{C3A_TORCH_ROOT}")
endif()
if(NOT C3A_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
    OUTPUT_VARIABLE C3A_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

# The header that states the version is as old as the target.
set(_torch_version "none")
if(EXISTS "${C3A_TORCH_ROOT}/include/torch/headeronly/version.h")
  file(STRINGS "${C3A_TORCH_ROOT}/include/torch/headeronly/version.h" _torch_version
    REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
  string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]*([0-9]+).*" "\\1.\\2" _torch_version "${_torch_version}")
elseif(EXISTS "${C3A_TORCH_ROOT}/version.py")
  file(STRINGS "${C3A_TORCH_ROOT}/version.py" _torch_version REGEX "^__version__ = ")
  string(REGEX REPLACE ".*['\"](.*)['\"].*" "\\1" _torch_version "${_torch_version}")
endif()
if(_torch_version VERSION_LESS C3A_TORCH_TARGET_TEXT
   OR NOT EXISTS "${C3A_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "c3a needs the headers of torch ${C3A_TORCH_TARGET_TEXT} or newer, found torch: "
    "${_torch_version}, in '${C3A_TORCH_ROOT}': pip install 'torch>=${C3A_TORCH_TARGET_TEXT}' first, "
    "then build with --no-build-isolation, or set C3A_TORCH_ROOT to an installed torch's folder")
endif()
message(STATUS "torch headers: ${_torch_version}, ${C3A_TORCH_ROOT}")

# What CUDA it was built for; empty where for none. Written as in: cuda: Optional[str] = '12.8'
set(C3A_TORCH_CUDA "")
if(EXISTS "${C3A_TORCH_ROOT}/version.py")
  file(STRINGS "${C3A_TORCH_ROOT}/version.py" _cuda_line REGEX "^cuda[ :]")
  if(_cuda_line MATCHES "['\"]([0-9.]+)['\"]")
    set(C3A_TORCH_CUDA "${CMAKE_MATCH_1}")
  endif()
endif()

# A stand-in that carries only the SONAME. The process has the real library loaded already, since
# torch is imported first; tests/test_package.py compares the symbols.
function(c3a_stand_in target soname)
  file(WRITE "${CMAKE_BINARY_DIR}/stand_ins/${soname}.cpp" "")
  add_library(${target} SHARED "${CMAKE_BINARY_DIR}/stand_ins/${soname}.cpp")
  set_target_properties(${target} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stand_ins"
    NO_SONAME ON PREFIX "" OUTPUT_NAME "${soname}" SUFFIX "")
  target_link_options(${target} PRIVATE "LINKER:-soname,${soname}")
endfunction()
c3a_stand_in(stand_in_torch_cpu libtorch_cpu.so)

function(c3a_operator_library target)
  target_include_directories(${target} SYSTEM PRIVATE "${C3A_TORCH_ROOT}/include")
  target_compile_definitions(${target} PRIVATE
    TORCH_TARGET_VERSION=${C3A_TORCH_TARGET} C3A_NAMESPACE=${C3A_NAMESPACE})
  target_link_libraries(${target} PRIVATE stand_in_torch_cpu)
  target_link_options(${target} PRIVATE
    LINKER:--no-as-needed LINKER:--allow-shlib-undefined LINKER:-z,lazy
    LINKER:--unresolved-symbols=ignore-all)
  # Libraries of two namespaces in one process are told apart by their names.
  string(REGEX REPLACE "^c3a" "${C3A_NAMESPACE}" _name ${target})
  set_target_properties(${target} PROPERTIES
    OUTPUT_NAME ${_name} SKIP_BUILD_RPATH ON INSTALL_RPATH "")
  c3a_for_old_systems(${target})
  install(TARGETS ${target} LIBRARY DESTINATION c3a)
endfunction()
