#pragma once
#include <cuda_runtime_api.h>

#include <utility>

namespace rtpurbo::cuda {

/// Launches a kernel whose blocks may start before the kernel ahead of it has ended, where it was
/// compiled for that (sm_90); it calls ptx::await_previous_kernel before it reads.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, int threads,
                             cudaStream_t stream, Arguments&&... arguments) {
  // Of its source, which matters where the driver compiled it: earlier code does not wait.
  cudaFuncAttributes code{};
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace rtpurbo::cuda
