#pragma once
#include <cuda_runtime.h>

#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// Row 0 of a head of a [B, H, S, D] tensor.
template <typename T>
__device__ T* head_rows(const HeadsView& view, int64_t batch, int64_t head) {
  return static_cast<T*>(view.ptr) + batch * view.batch_stride + head * view.head_stride;
}

}  // namespace rtpurbo::cuda
