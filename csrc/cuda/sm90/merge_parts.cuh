#pragma once
// Puts the parts of split row tiles together: with lse_i and out_i of a row's parts,
//   lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/sm90/attention_parts.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda::sm90 {

inline constexpr int kMergedRows = 8;  // of a block: a warp merges one

template <typename T, int kDim>
__global__ __launch_bounds__(kMergedRows * 32) void merge_parts_kernel(
    const __grid_constant__ AttentionParams params, const __grid_constant__ WorkQueue queue,
    const __grid_constant__ WorkQueue::Role role) {
  constexpr int kColumns = kDim / 32;  // of a lane
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t blocks_of_tile = kTileRows / kMergedRows;
  const uint32_t tile_number = blockIdx.x / blocks_of_tile;
  const WorkQueue::Tile tile = queue.tile(role, tile_number);
  const int of_tile =
      static_cast<int>(blockIdx.x % blocks_of_tile * kMergedRows + threadIdx.x / 32);
  const int64_t row = int64_t{tile.number} * kTileRows + of_tile;
  if (row >= params.rows) return;

  const Parts<kDim> parts(params.parts_ptr);
  const int64_t first = role.first_part + int64_t{tile_number} * role.parts;
  const int count = static_cast<int>(role.parts);
  float top = -INFINITY;
  for (int i = 0; i < count; ++i) top = fmaxf(top, parts.lse(first + i)[of_tile]);
  const float shift = softmax_shift(top);
  float total = 0.0f, sums[kColumns] = {};
  for (int i = 0; i < count; ++i) {
    const float share = expf(parts.lse(first + i)[of_tile] - shift);
    total += share;
    const float* out = parts.out(first + i) + of_tile * kDim + lane;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] = fmaf(share, out[32 * j], sums[j]);
  }
  const HeadJob& job = params.heads.jobs[tile.job];
  T* to = head_rows<T>(params.out, tile.batch, job.head) + row * params.out.row_stride;
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = lane + 32 * j;
    if (column < params.dim) to[column] = from_float<T>(sums[j] * scale);
  }
  if (lane == 0) {
    params.lse_ptr[(tile.batch * params.lse_heads + job.lse_head) * params.rows + row] =
        shift + logf(total);
  }
}

/// Those of all roles that are split.
template <typename T, int kDim>
cudaError_t merge_parts(const AttentionParams& params, const WorkQueue& queue,
                        cudaStream_t stream) {
  for (const WorkQueue::Role& role : {queue.retrieval, queue.near}) {
    if (role.parts == 1) continue;
    const auto tiles = static_cast<uint32_t>(params.batch) * role.heads * queue.tiles;
    if (tiles == 0) continue;
    merge_parts_kernel<T, kDim>
        <<<tiles*(kTileRows / kMergedRows), kMergedRows * 32, 0, stream>>>(params, queue, role);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rtpurbo::cuda::sm90
