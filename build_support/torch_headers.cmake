# Operator libraries on the LibTorch stable ABI: torch's headers and nothing else of it. No
# find_package(Torch), no import of torch, no Python in the libraries; one binary for every torch
# from the target on.

set(C3A_TORCH_TARGET 0x020a000000000000ULL) # 2.10

# pip's build isolation hides the host's packages by PYTHONPATH and PYTHONHOME alone: look as given,
# then behind them.
set(_find_torch "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
if(NOT C3A_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${_find_torch}"
    OUTPUT_VARIABLE C3A_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT C3A_TORCH_ROOT)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env --unset=PYTHONPATH --unset=PYTHONHOME
            "${Python_EXECUTABLE}" -c "${_find_torch}"
    OUTPUT_VARIABLE C3A_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT EXISTS "${C3A_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "c3a needs the headers of torch >= 2.10, found none in '${C3A_TORCH_ROOT}': install torch first, "
    "or point C3A_TORCH_ROOT at a torch package")
endif()
message(STATUS "torch headers: ${C3A_TORCH_ROOT}")

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
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${C3A_TORCH_TARGET})
  target_link_libraries(${target} PRIVATE stand_in_torch_cpu)
  target_link_options(${target} PRIVATE
    LINKER:--no-as-needed LINKER:--allow-shlib-undefined LINKER:-z,lazy
    LINKER:--unresolved-symbols=ignore-all)
  set_target_properties(${target} PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "")
  install(TARGETS ${target} LIBRARY DESTINATION c3a)
endfunction()
