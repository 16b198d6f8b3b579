#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

struct RetrievalScoresParams {
  ElementType type;          // of q and k
  HeadsView q, k;            // [B, Hq, rows, dim], [B, Hk, keys, dim]
  const int64_t* start_ptr;  // [B] or null
  float* mass_ptr;           // [B, Hq, rows]
  int64_t batch, query_heads, kv_heads, rows, keys, dim;
  int64_t pre_begin, pre_end;
  float scale;
};

/// The attention mass of each row on the keys [pre_begin, pre_end); 0 where it sees no key.
cudaError_t launch_retrieval_scores(const RetrievalScoresParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
