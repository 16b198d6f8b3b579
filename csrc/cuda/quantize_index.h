#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

struct QuantizeIndexParams {
  ElementType type;
  HeadsView k_index;   // [B, heads, keys, dim]
  uint8_t* codes_ptr;  // [B, heads, keys, code bytes]
  void* ranges_ptr;    // half [B, heads, keys / kIndexBlock, 2 dim]
  int64_t batch, heads, keys, dim, bits;
};

/// The bits of the CPU operator's float32 arithmetic.
cudaError_t launch_quantize_index(const QuantizeIndexParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
