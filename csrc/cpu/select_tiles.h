#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

struct SelectTilesParams {
  c10::ScalarType q_dtype, k_dtype, accum;  // accum float or double
  HeadsView q_index, k_index;               // [B, heads, rows, dim], [B, key_heads, keys, dim]
  const int64_t* index_map;                 // [heads]
  const void* threshold_ptr;                // [heads] of accum
  const void* near_lse_ptr;                 // [B, heads, rows] of accum, or null
  const void* offset_ptr;                   // [heads] of accum, or null
  const int64_t* start_ptr;                 // [B] or null
  int32_t* indices_ptr;                     // [B, heads, tiles, capacity]
  int32_t* counts_ptr;                      // [B, heads, tiles]
  void* mass_ptr;                           // [B, heads, tiles] of accum
  int64_t batch, heads, rows, keys, dim, tiles, capacity;
  int64_t window, sinks, min_blocks, tile, block_size;
  bool rank_by_max;
};

RTPURBO_DECLARE_CPU_KERNEL(select_tiles_kernel, SelectTilesParams)

}  // namespace rtpurbo::cpu
