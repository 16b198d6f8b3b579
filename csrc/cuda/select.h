#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/head_list.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

constexpr int kMaxIndexDim = 512;

struct SelectParams {
  ElementType q_type, k_type;
  HeadsView q_index, k_index;  // [B, heads, rows, dim], [B, key_heads, keys, dim]
  HeadList index_map;          // key head of each query head
  const float* near_lse_ptr;   // [B, heads, rows], or null
  const float* offset_ptr;     // [heads], or null
  const int64_t* start_ptr;    // [B], or null
  int32_t* indices_ptr;        // [B, heads, rows, capacity]
  int32_t* counts_ptr;         // [B, heads, rows]
  float* mass_ptr;             // [B, heads, rows]
  int64_t batch, heads, rows, keys, dim;
  int64_t window, sinks, block_size;
  int64_t capacity, min_members;
  double p;
  bool exact;
};

/// Bytes of workspace that launch_select needs; it does not grow with rows * keys.
size_t select_workspace(const SelectParams& params);

/// Scores all keys, then chooses by a histogram of log-weights and, in exact mode, by radix
/// selection inside the threshold bin. Masses are summed as integers: reruns give the same bits.
cudaError_t launch_select(const SelectParams& params, void* workspace, int sm_count,
                          cudaStream_t stream);

}  // namespace rtpurbo::cuda
