#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

/// Bytes of rows copied into slots of a cache. A negative slot_window means pages: slot = position.
struct CacheAppendParams {
  HeadsView source, target;  // strides in bytes; target is written
  const int64_t* heads;      // [heads_count] heads of source, in target's order
  const int64_t* start_ptr;  // [B] or null
  int64_t batch, heads_count, rows, row_bytes;
  int64_t position;  // of row 0
  int64_t sinks;
  int64_t slot_window;  // ring slots behind the sinks, or -1 for pages
};

/// keys [B, heads, sinks + window + rows, D] in order of position, from a ring and new rows.
struct CacheUnrollParams {
  HeadsView ring, source, target;  // strides in bytes
  const int64_t* heads;            // of source
  const int64_t* start_ptr;
  int64_t* start_local_ptr;  // [B]
  int64_t batch, heads_count, rows, row_bytes;
  int64_t position, sinks, window;
};

RTPURBO_DECLARE_CPU_KERNEL(cache_append_kernel, CacheAppendParams)
RTPURBO_DECLARE_CPU_KERNEL(cache_unroll_kernel, CacheUnrollParams)

}  // namespace rtpurbo::cpu
