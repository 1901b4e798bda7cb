# C3A_MANYLINUX: libraries that ask a system for no more than manylinux_2_28 promises, whatever
# compiler they are built with. Linked as old_libstdcxx.py says.

if(C3A_MANYLINUX)
  set(_old "${CMAKE_BINARY_DIR}/manylinux")
  set(C3A_OLD_LIBSTDCXX "${_old}/libstdc++.so.6")
  file(MAKE_DIRECTORY "${_old}")
  execute_process(
    COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libstdc++.so.6
    OUTPUT_VARIABLE _new OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/old_libstdcxx.py" "${_new}" "${_old}"
    COMMAND_ERROR_IS_FATAL ANY)
  execute_process(
    COMMAND "${CMAKE_CXX_COMPILER}" -shared -nostdlib -x assembler "${C3A_OLD_LIBSTDCXX}.s"
            -Wl,-soname,libstdc++.so.6 "-Wl,--version-script=${C3A_OLD_LIBSTDCXX}.map"
            -o "${C3A_OLD_LIBSTDCXX}"
    COMMAND_ERROR_IS_FATAL ANY)
endif()

function(c3a_for_old_systems target)
  if(C3A_MANYLINUX)
    target_sources(${target} PRIVATE "${CMAKE_SOURCE_DIR}/build_support/manylinux.cpp")
    target_link_libraries(${target} PRIVATE "${C3A_OLD_LIBSTDCXX}" -l:libstdc++.a)
    target_link_options(${target} PRIVATE LINKER:--exclude-libs,libstdc++.a)
  endif()
endfunction()
