#pragma once
// The border between torch and the framework-free CUDA launchers.

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/head_list.h"

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
      TORCH_CHECK_TYPE(false, "rtpurbo: no CUDA kernels for dtype ", type);
  }
}

/// Head numbers as kernel parameters.
inline HeadList head_list(const char* op, const char* name, at::IntArrayRef heads) {
  TORCH_CHECK_VALUE(heads.size() <= HeadList::kMax, "rtpurbo::", op, ": ", name,
                    " on CUDA must name at most ", HeadList::kMax, " heads, got ", heads.size());
  HeadList list;
  list.count = static_cast<int32_t>(heads.size());
  for (size_t i = 0; i < heads.size(); ++i) list.heads[i] = static_cast<int16_t>(heads[i]);
  return list;
}

/// Streaming multiprocessors of the current device.
inline int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

}  // namespace rtpurbo::cuda

namespace rtpurbo {

/// Raises for float64, which only the CPU kernels take.
inline void check_cuda_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() != at::kDouble, "rtpurbo::", op, ": ", name,
                   " on CUDA must be float32, bfloat16 or float16, got float64; convert with "
                   ".float() or call it on the CPU");
}

}  // namespace rtpurbo
