#pragma once
// Stage 2: the log-mass of all keys of a row, from its chunks in order.

#include "csrc/cuda/select_tiles/row_parts.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kTotalsRows = 32;
constexpr int kTotalsParts = 8;  // runs of chunks, side by side
constexpr int kTotalsThreads = kTotalsRows * kTotalsParts;

/// Log-mass of the near keys as the caller gave it, without the offset that all far keys share.
__device__ __forceinline__ float given_near(const SelectTilesParams& p, const Tile& tile, int i) {
  const int64_t row = tile.number * p.tile + i;
  const float near = p.near_lse_ptr[(tile.batch * p.heads + tile.head) * p.rows + row];
  return kLog2E * (p.offset_ptr ? near - p.offset_ptr[tile.head] : near);
}

/// One thread block sums up 32 rows.
__global__ __launch_bounds__(kTotalsThreads) void totals_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w) {
  __shared__ Log2Sum far_parts[kTotalsParts][kTotalsRows], near_parts[kTotalsParts][kTotalsRows];
  const int64_t groups = w.height / kTotalsRows;
  const int64_t slot = blockIdx.x / groups;
  const int lane = threadIdx.x % kTotalsRows, part = threadIdx.x / kTotalsRows;
  const int row = static_cast<int>(blockIdx.x % groups) * kTotalsRows + lane;
  const Tile tile = tile_of(p, w, slot);
  const bool valid = !tile.empty() && tile.has(row);
  Log2Sum far, near;
  if (valid) {
    const Range chunks = scored_chunks(w, scored_blocks(p, tile));
    const int each = (chunks.end - chunks.begin + kTotalsParts - 1) / kTotalsParts;
    const int begin = chunks.begin + part * each;
    const int end = min(begin + each, chunks.end);
#pragma unroll 4
    for (int chunk = begin; chunk < end; ++chunk) {
      far.add(load_sum(w.far + w.part(slot, chunk, row)));
      if (!p.near_lse_ptr) near.add(load_sum(w.near + w.part(slot, chunk, row)));
    }
  }
  far_parts[part][lane] = far;
  near_parts[part][lane] = near;
  __syncthreads();
  if (part != 0) return;
  float total = INFINITY, near_lse = -INFINITY;
  if (valid) {
    for (int i = 1; i < kTotalsParts; ++i) {
      far.add(far_parts[i][lane]);
      near.add(near_parts[i][lane]);
    }
    near_lse = p.near_lse_ptr ? given_near(p, tile, row) : near.value();
    far.add(near_lse);
    total = far.value();
  }
  w.totals[w.row(slot, row)] = total;
  w.near_lse[w.row(slot, row)] = near_lse;
}

}  // namespace rtpurbo::cuda::tiles
