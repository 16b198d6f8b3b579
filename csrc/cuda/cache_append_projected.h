#pragma once
#include "csrc/cuda/cache.h"
#include "csrc/cuda/index_project.h"

namespace rtpurbo::cuda {

/// index.k.out is where index keys go among their pages; `rows` has none.
struct CacheAppendProjectedParams {
  IndexProjectParams index;
  CacheAppendParams rows;
};

/// One launch where there are few rows, otherwise one for each part.
cudaError_t launch_cache_append_projected(const CacheAppendProjectedParams& params,
                                          cudaStream_t stream);

}  // namespace rtpurbo::cuda
