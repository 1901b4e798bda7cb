# CMake's toolchain file for aarch64: the cross compiler of Debian and Ubuntu.

find_program(C3A_AARCH64_COMPILER aarch64-linux-gnu-g++)
if(NOT C3A_AARCH64_COMPILER)
  message(FATAL_ERROR
    "c3a for aarch64 needs aarch64-linux-gnu-g++ and found none: install it (on Debian and Ubuntu: "
    "apt install g++-aarch64-linux-gnu)")
endif()
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER "${C3A_AARCH64_COMPILER}")
