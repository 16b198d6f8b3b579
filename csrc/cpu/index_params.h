#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

/// What the selecting operators score: index queries against index keys, and which keys are near.
/// Keys [0, coded) are quantised, k_index holds the others; with `refine` it goes on before its
/// first row, down to key 0.
struct IndexParams {
  c10::ScalarType q_dtype, k_dtype, accum;  // accum float or double
  HeadsView q_index, k_index;  // [B, heads, rows, dim], [B, key_heads, keys - coded, dim]
  HeadsView codes, ranges;     // uint8 [B, key_heads, coded, code bytes], half [.., 2 dim]
  int64_t code_bits, coded;
  bool refine;               // score the best keys of codes again, as k_index has them
  const int64_t* index_map;  // [heads]
  const void* near_lse_ptr;  // [B, heads, rows] of accum, or null
  const void* offset_ptr;    // [heads] of accum, or null
  const int64_t* start_ptr;  // [B] or null
  int64_t batch, heads, key_heads, rows, keys, dim;
  int64_t window, sinks, block_size;
};

}  // namespace rtpurbo::cpu
