#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

/// "accum" is double for double q or index tensors, otherwise float.
struct IndexKlParams {
  c10::ScalarType dtype, q_index_dtype, k_index_dtype, accum;
  HeadsView q, k;                  // [B, Hq, rows, dim], [B, Hk, keys, dim]
  HeadsView q_index, k_index;      // [B, heads, rows, index_dim], [B, Rk, keys, index_dim]
  const int64_t* rows_ptr;         // [B, rows] positions, all < keys
  const int64_t* retrieval_heads;  // [heads]
  const int64_t* index_map;        // [heads]
  const void* offset_ptr;          // [heads] of accum, or null
  const int64_t* start_ptr;        // [B] or null
  void* kl_ptr;                    // [heads] of accum
  void* kl_rows_ptr;               // [B, heads, rows] of accum, zero on entry
  void* grad_q_ptr;                // [B, heads, rows, index_dim] of accum, zero on entry
  void* grad_k_ptr;                // [B, heads, keys, index_dim] of accum, zero on entry
  void* grad_offset_ptr;           // [heads] of accum
  int64_t batch, heads, group, rows, keys, dim, index_dim;
  int64_t window, sinks;
  double scale;
  bool beyond_window;
};

RTPURBO_DECLARE_CPU_KERNEL(index_kl_kernel, IndexKlParams)

}  // namespace rtpurbo::cpu
