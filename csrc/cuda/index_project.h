#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/head_list.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// out[b, j] = x[b, heads[j]] w[j]^T, for queries or for keys.
struct IndexProjectSide {
  HeadsView x, out;   // [B, H, rows, dim], [B, heads, rows, index_dim]
  const void* w_ptr;  // [heads, index_dim, dim] contiguous
  HeadList heads;
  int64_t rows;
};

struct IndexProjectParams {
  ElementType x_type, w_type, out_type;
  IndexProjectSide q, k;
  int64_t batch, dim, index_dim;
};

/// Both sides in one launch; sums in float32.
cudaError_t launch_index_project(const IndexProjectParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
