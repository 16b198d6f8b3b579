#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/head_list.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// New rows and where they are stored; strides in bytes.
struct CacheStore {
  HeadsView source = {}, pages = {}, ring = {};
  int64_t row_bytes = 0;
  int64_t window = 0;  // ring slots behind the sinks
};

struct CacheAppendParams {
  static constexpr int kStores = 2;
  CacheStore stores[kStores] = {};  // keys, values
  HeadList heads = {};     // of the sources: those of the pages in their order, then of the rings
  int32_t page_heads = 0;  // how many of them belong to the pages
  const int64_t* start_ptr = nullptr;  // [B] or null
  int64_t batch = 0, rows = 0;
  int64_t position = 0;  // of row 0
  int64_t sinks = 0;
  CacheStore index = {};  // pages only, a head each
  int32_t index_heads = 0;
  int64_t index_slot = 0;  // of row 0
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
