# Defines rtpurbo::torch, the LibTorch of the Python environment (or of TORCH_ROOT, a folder with include/ and lib/).
# find_package(Torch) is not used: for a CUDA wheel it insists on a CUDA toolkit, which CPU builds do not need.
if(TARGET rtpurbo::torch)
  return()
endif()
if(NOT TORCH_ROOT)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    RESULT_VARIABLE torch_lookup)
  if(NOT torch_lookup EQUAL 0)
    message(FATAL_ERROR "rtpurbo: no torch in ${Python_EXECUTABLE}; `pip install 'torch>=2.11'` there, "
                        "or pass -DTORCH_ROOT=<folder with include/ and lib/>")
  endif()
endif()
if(EXISTS "${TORCH_ROOT}/version.py")
  file(STRINGS "${TORCH_ROOT}/version.py" torch_lines)
  string(REGEX MATCH "__version__ = '([^']+)'" _ "${torch_lines}")
  set(TORCH_VERSION "${CMAKE_MATCH_1}")
  if("${torch_lines}" MATCHES "cuda: [^=]*= '([0-9.]+)'")
    set(TORCH_CUDA_VERSION "${CMAKE_MATCH_1}")
  endif()
endif()
if(TORCH_VERSION AND TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "rtpurbo: torch ${TORCH_VERSION} found in ${TORCH_ROOT}; 2.11 is the floor")
endif()

find_package(Threads REQUIRED)
add_library(rtpurbo::torch INTERFACE IMPORTED GLOBAL)
target_include_directories(rtpurbo::torch SYSTEM INTERFACE
  "${TORCH_ROOT}/include" "${TORCH_ROOT}/include/torch/csrc/api/include")
target_link_libraries(rtpurbo::torch INTERFACE
  "${TORCH_ROOT}/lib/libtorch.so" "${TORCH_ROOT}/lib/libtorch_cpu.so" "${TORCH_ROOT}/lib/libc10.so" Threads::Threads)
# libtorch.so carries no symbols of its own; the CUDA wheel's backends register only if it stays linked.
target_link_options(rtpurbo::torch INTERFACE "LINKER:--no-as-needed,-rpath,${TORCH_ROOT}/lib")
if(EXISTS "${TORCH_ROOT}/lib/libc10_cuda.so")
  add_library(rtpurbo::torch_cuda INTERFACE IMPORTED GLOBAL)
  target_link_libraries(rtpurbo::torch_cuda INTERFACE rtpurbo::torch "${TORCH_ROOT}/lib/libc10_cuda.so"
    "${TORCH_ROOT}/lib/libtorch_cuda.so")
endif()
