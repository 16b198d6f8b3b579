#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

struct SelectParams {
  c10::ScalarType q_dtype, k_dtype, accum;  // accum float or double
  HeadsView q_index, k_index;               // [B, heads, rows, dim], [B, key_heads, keys, dim]
  const int64_t* index_map;                 // [heads]
  const void* near_lse_ptr;                 // [B, heads, rows] of accum, or null
  const void* offset_ptr;                   // [heads] of accum, or null
  const int64_t* start_ptr;                 // [B] or null
  int32_t* indices_ptr;                     // [B, heads, rows, capacity]
  int32_t* counts_ptr;                      // [B, heads, rows]
  void* mass_ptr;                           // [B, heads, rows] of accum
  int64_t batch, heads, key_heads, rows, keys, dim, capacity;
  int64_t window, sinks, min_members, block_size;
  double p;
  bool exact;
};

RTPURBO_DECLARE_CPU_KERNEL(select_kernel, SelectParams)

}  // namespace rtpurbo::cpu
