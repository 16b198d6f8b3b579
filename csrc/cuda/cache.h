#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/head_list.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// New rows and where they are stored; strides in bytes.
struct CacheStore {
  HeadsView source, pages, ring;
  int64_t row_bytes;
  int64_t window;  // ring slots behind the sinks
};

struct CacheAppendParams {
  CacheStore stores[2];  // keys, values
  int32_t stores_count;
  HeadList heads;      // of the sources: those of the pages in their order, then those of the rings
  int32_t page_heads;  // how many of them belong to the pages
  const int64_t* start_ptr;  // [B] or null
  int64_t batch, rows;
  int64_t position;  // of row 0
  int64_t sinks;
};

/// keys [B, heads, sinks + window + rows, D] in order of position, from a ring and new rows.
struct CacheUnrollParams {
  HeadsView ring, source, target;  // strides in bytes
  HeadList heads;                  // of source
  const int64_t* start_ptr;        // [B] or null
  int64_t* start_local_ptr;        // [B]
  int64_t batch, rows, row_bytes;
  int64_t position, sinks, window;
};

cudaError_t launch_cache_append(const CacheAppendParams& params, cudaStream_t stream);
cudaError_t launch_cache_unroll(const CacheUnrollParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
