#pragma once
// The border between torch and the framework-free CUDA launchers.

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "csrc/cuda/element_type.h"

/// Raises when a launcher returns an error.
#define RTPURBO_CUDA_CHECK(op, call)                                                     \
  do {                                                                                   \
    const cudaError_t error = (call);                                                    \
    TORCH_CHECK(error == cudaSuccess, "rtpurbo::", op, ": ", cudaGetErrorString(error)); \
  } while (false)

namespace rtpurbo::cuda {

inline ElementType element_type(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Float:
      return ElementType::kFloat32;
    case c10::ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case c10::ScalarType::Half:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "rtpurbo: tensors on CUDA must be float32, bfloat16 or float16, got ",
                       type, "; convert them with .to()");
  }
}

/// Streaming multiprocessors of the current device.
inline int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

}  // namespace rtpurbo::cuda
