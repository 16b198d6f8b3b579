#pragma once
// Stage 1 for any element types, dims and block sizes: a lane scores one row, its warp the blocks
// of a chunk in turn, so that the lanes read the same key.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select_tiles/row_parts.cuh"

namespace rtpurbo::cuda::tiles {

namespace plain {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 32;
constexpr int kKeys = 8;  // scored at a time

inline size_t shared_bytes(int64_t dim) { return dim * kRows * sizeof(float); }

}  // namespace plain

template <typename TK>
__global__ __launch_bounds__(plain::kThreads) void plain_scores_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w) {
  using namespace plain;
  extern __shared__ float queries[];  // [dim, kRows], scaled
  __shared__ Log2Sum far_parts[kWarps][kRows], near_parts[kWarps][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunk = blockIdx.x % w.chunks;
  const int64_t group = blockIdx.x / w.chunks;
  const int64_t groups = w.height / kRows;
  const int64_t slot = group / groups;
  const Tile tile = tile_of(p, w, slot);
  const int row = static_cast<int>(group % groups) * kRows;
  if (tile.empty() || row > tile.last) return;
  const Range blocks = chunk_blocks(w, scored_blocks(p, tile), chunk);
  if (blocks.end <= blocks.begin) return;

  const int dim = static_cast<int>(p.dim);
  const float scale = kLog2E * rsqrtf(static_cast<float>(dim));
  for (int i = threadIdx.x; i < dim * kRows; i += kThreads) {
    const int r = row + i % kRows;
    const int64_t at = tile.batch * p.q_index.batch_stride + tile.head * p.q_index.head_stride +
                       (tile.number * p.tile + r) * p.q_index.row_stride + i / kRows;
    queries[i] = tile.has(r) ? scale * load_as_float(p.q_type, p.q_index.ptr, at) : 0.0f;
  }
  __syncthreads();

  const TK* keys = head_rows<const TK>(p.k_index, tile.batch, p.index_map.heads[tile.head]);
  const int own_row = row + lane;
  const bool valid = tile.has(own_row);
  const int far_end = valid ? tile.far_end(own_row) : 0;
  const int end = valid ? tile.end(own_row) : 0;
  // Only these keys are read: others may hold anything.
  const int read_begin = p.near_lse_ptr ? tile.far_begin : tile.start;
  const int read_end = p.near_lse_ptr ? tile.far_end(tile.last) : tile.end(tile.last);
  Log2Sum far, near;
  for (int block = blocks.begin + warp; block < blocks.end; block += kWarps) {
    const int64_t block_begin = static_cast<int64_t>(block) * tile.block_size;
    const int first = static_cast<int>(max(block_begin, static_cast<int64_t>(read_begin)));
    const int last =
        static_cast<int>(min(block_begin + tile.block_size, static_cast<int64_t>(read_end)));
    Log2Sum mass;
    for (int n = first; n < last; n += kKeys) {
      float scores[kKeys] = {};
      for (int d = 0; d < dim; ++d) {
        const float q = queries[d * kRows + lane];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          const int64_t key = min(n + i, last - 1);
          scores[i] = fmaf(q, to_float(keys[key * p.k_index.row_stride + d]), scores[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int key = n + i;
        if (key >= last) break;
        if (key >= tile.far_begin && key < far_end) {
          if (p.rank_by_max) {
            mass.keep_largest(scores[i]);
          } else {
            mass.add(scores[i]);
          }
        } else if (key >= tile.start && key < end) {
          near.add(scores[i]);
        }
      }
    }
    w.mass(slot, block, own_row) = mass.value();
    far.add(mass.value());
  }
  far_parts[warp][lane] = far;
  near_parts[warp][lane] = near;
  __syncthreads();
  if (warp != 0) return;
  for (int i = 1; i < kWarps; ++i) {
    far.add(far_parts[i][lane]);
    near.add(near_parts[i][lane]);
  }
  store(w.far + w.part(slot, chunk, own_row), far);
  if (!p.near_lse_ptr) store(w.near + w.part(slot, chunk, own_row), near);
}

}  // namespace rtpurbo::cuda::tiles
