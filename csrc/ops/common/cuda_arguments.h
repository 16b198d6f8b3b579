#pragma once
// From the arguments of the operators to what every CUDA kernel takes.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "csrc/cpu/index_params.h"
#include "csrc/cuda/head_list.h"
#include "csrc/cuda/limits.h"

namespace rtpurbo::cuda {

/// Refuses float64, for which there are no CUDA kernels.
inline void check_not_double(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(type != at::kDouble, "rtpurbo::", op, ": ", name,
                   " on CUDA must be float32, bfloat16 or float16, got float64; convert with "
                   ".float() or call it on the CPU");
}

/// What the kernels that score index keys are limited to.
inline void check_index(const char* op, const cpu::IndexParams& in) {
  check_not_double(op, "q_index", in.q_dtype);
  check_not_double(op, "k_index", in.k_dtype);
  TORCH_CHECK_VALUE(in.dim <= kMaxIndexDim, "rtpurbo::", op,
                    ": q_index on CUDA must have an index dim r <= ", kMaxIndexDim, ", got ",
                    in.dim);
}

inline HeadList head_list(const char* op, const char* name, at::IntArrayRef heads) {
  TORCH_CHECK_VALUE(heads.size() <= HeadList::kMax, "rtpurbo::", op, ": ", name,
                    " on CUDA must be at most ", HeadList::kMax, " heads, got ", heads.size());
  HeadList list;
  for (const int64_t head : heads) {
    TORCH_CHECK_VALUE(head <= INT16_MAX, "rtpurbo::", op, ": ", name,
                      " on CUDA must be head numbers below 32768, got ", head);
    list.heads[list.count++] = static_cast<int16_t>(head);
  }
  return list;
}

}  // namespace rtpurbo::cuda
