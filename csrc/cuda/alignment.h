#pragma once
#include <cstdint>

#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// Whether every row of the view begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const HeadsView& view, int64_t element_bytes) {
  const int64_t strides = view.batch_stride | view.head_stride | view.row_stride;
  return reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0 && strides * element_bytes % 16 == 0;
}

}  // namespace rtpurbo::cuda
