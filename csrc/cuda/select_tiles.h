#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/head_list.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// Query rows of a tile go up to this: the masses of all its rows are held at once.
constexpr int64_t kMaxTile = 1024;

struct SelectTilesParams {
  ElementType q_type, k_type;
  HeadsView q_index, k_index;  // [B, heads, rows, dim], [B, key_heads, keys, dim]
  HeadList index_map;          // key head of each query head
  const float* near_lse_ptr;   // [B, heads, rows], or null
  const float* offset_ptr;     // [heads], or null
  const int64_t* start_ptr;    // [B], or null
  const float* threshold_ptr;  // [heads]
  int32_t* indices_ptr;        // [B, heads, all_tiles, capacity]
  int32_t* counts_ptr;         // [B, heads, all_tiles]
  float* mass_ptr;             // [B, heads, all_tiles]
  int64_t batch, heads, rows, keys, dim;
  int64_t window, sinks;  // at most keys
  int64_t all_tiles, tile, block_size;
  int64_t capacity, min_blocks;
  bool rank_by_max;
};

/// Bytes of workspace that launch_select_tiles needs: a bounded number of tiles at a time, at least
/// one with a float for each of its rows and blocks.
size_t select_tiles_workspace(const SelectTilesParams& params);

/// Scores a run of tiles, keeping one log-mass for each row and block; then sums up the rows, pools
/// their shares and chooses. Sums have a fixed order: reruns give the same bits.
cudaError_t launch_select_tiles(const SelectTilesParams& params, void* workspace,
                                cudaStream_t stream);

}  // namespace rtpurbo::cuda
