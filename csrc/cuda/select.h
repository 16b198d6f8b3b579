#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/head_list.h"
#include "csrc/cuda/limits.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

struct SelectParams {
  ElementType q_type, k_type;
  HeadsView q_index, k_index;  // [B, heads, rows, dim], [B, key_heads, keys - coded, dim]
  HeadsView codes, ranges;     // of keys [0, coded), as quantize_index makes them
  int64_t coded;
  int code_bits;              // 4 or 8
  bool refine;                // k_index goes on before its first row, down to key 0; select only
  HeadList index_map;         // key head of each query head
  bool whole_bins;            // the rest of the threshold's bin may be added
  bool near_is_scored;        // form `full`: the near keys' mass is that of their scores
  const float* near_lse_ptr;  // [B, heads, rows], or null
  const float* offset_ptr;    // [heads], or null
  const int64_t* start_ptr;   // [B], or null
  int32_t* indices_ptr;       // [B, heads, rows, capacity]
  int32_t* counts_ptr;        // [B, heads, rows]
  float* mass_ptr;            // [B, heads, rows]
  int64_t batch, heads, rows, keys, dim;
  int64_t window, sinks, block_size;
  int64_t capacity, min_members;
  double p;
};

/// How a cooperative launch covers the problems, and what it needs.
struct SelectPlan {
  int teams, team_size, blocks;
  int run_shift;  // log2 of the groups that follow each other in a warp
  int warp_groups;
  bool scores_in_shared;
  bool sieves;        // of sparse_decode, where blocks score many keys
  int shared_blocks;  // that scan a key head for all its heads; 0: teams scan for themselves
  int64_t time;       // as far as it can be told before, in members that a block scores
  size_t shared_bytes;
  size_t workspace_bytes;  // does not grow with batch * heads * rows * keys
};

/// Scores all keys, then chooses by a histogram of log-weights and, inside the threshold bin, by
/// radix selection, unless it is added whole. Masses are summed as integers: reruns give the same
/// bits.
cudaError_t plan_select(const SelectParams& params, SelectPlan& plan);
cudaError_t launch_select(const SelectParams& params, const SelectPlan& plan, void* workspace,
                          cudaStream_t stream);

}  // namespace rtpurbo::cuda
