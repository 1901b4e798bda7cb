# What the compiler must be able to do, tried by the code that needs it.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(C3A_LEVELS x86_64_v2 x86_64_v3 x86_64_v4 x86_64_v4_bf16)
  set(_highest -march=x86-64-v4 -mavx512bf16)
else()
  set(C3A_LEVELS native)
  set(_highest "")
endif()

set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
try_compile(_compiles
  SOURCES "${CMAKE_CURRENT_LIST_DIR}/compiler.cpp"
  COMPILE_DEFINITIONS ${_highest} -DC3A_LEVEL=tried
  CXX_STANDARD 20 CXX_EXTENSIONS OFF
  OUTPUT_VARIABLE _said NO_CACHE)
unset(CMAKE_TRY_COMPILE_TARGET_TYPE)
if(NOT _compiles)
  string(REGEX MATCH "[^\n]*error[^\n]*" _said "${_said}")
  message(FATAL_ERROR
    "c3a needs a compiler for C++20 with vector extensions, GCC 11 or Clang 14 or newer; "
    "${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) is not: install "
    "one and set CXX to it\n${_said}")
endif()
