#pragma once
// Element types in device code: conversion to float and back, and dispatch from the run-time tag.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "csrc/cuda/element_type.h"

namespace rtpurbo::cuda {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  return static_cast<T>(value);
}

/// Element i, whose type is known at run time only.
__device__ __forceinline__ float load_as_float(ElementType type, const void* ptr, int64_t i) {
  switch (type) {
    case ElementType::kFloat32:
      return static_cast<const float*>(ptr)[i];
    case ElementType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(ptr)[i]);
    default:
      return to_float(static_cast<const __half*>(ptr)[i]);
  }
}

/// Calls fn(T{}) for the element type T that `type` names.
template <typename Fn>
cudaError_t dispatch_element(ElementType type, Fn&& fn) {
  switch (type) {
    case ElementType::kFloat32:
      return fn(float{});
    case ElementType::kBFloat16:
      return fn(__nv_bfloat16{});
    case ElementType::kFloat16:
      return fn(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace rtpurbo::cuda
