#pragma once
// What the kernels of both devices are given of a tensor; free of torch.

#include <cstdint>

namespace rtpurbo {

/// A [B, H, S, D] tensor with contiguous D; strides in elements.
struct HeadsView {
  void* ptr = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

}  // namespace rtpurbo
