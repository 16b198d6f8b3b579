#pragma once
#include "csrc/cpu/capability.h"
#include "csrc/cpu/index_params.h"

namespace rtpurbo::cpu {

struct SelectTilesParams {
  IndexParams index;
  const void* threshold_ptr;  // [heads] of accum
  int32_t* indices_ptr;       // [B, heads, tiles, capacity]
  int32_t* counts_ptr;        // [B, heads, tiles]
  void* mass_ptr;             // [B, heads, tiles] of accum
  int64_t tiles, capacity, min_blocks, tile;
  bool rank_by_max;
};

RTPURBO_DECLARE_CPU_KERNEL(select_tiles_kernel, SelectTilesParams)

}  // namespace rtpurbo::cpu
