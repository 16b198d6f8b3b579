#pragma once
// Stage 1 by tensor cores (sm_80): fp16 queries and keys of 16 dimensions, blocks of 64 keys. A
// warp scores 32 rows, two blocks at a time, straight from L1: its eight neighbours read the same
// keys.

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select_tiles/mma_pair.cuh"
#include "csrc/cuda/select_tiles/row_parts.cuh"

namespace rtpurbo::cuda::tiles {

namespace mma {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 32;  // of a warp
constexpr int kPerSm = 2;

/// A lane's share of 16 rows: as operand rows g and g + 8, as sums row `own` with every other
/// block.
struct Rows {
  uint32_t query[4] = {};
  int far_end[2] = {}, end[2] = {};
  int own;
  Log2Sum far, near;

  __device__ void load(const SelectTilesParams& p, const Tile& tile, int first, int g, int t) {
    own = first + g + 8 * (t / 2);
    const __half* queries = head_rows<const __half>(p.q_index, tile.batch, tile.head) +
                            tile.number * p.tile * p.q_index.row_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + g + 8 * half;
      if (!tile.has(i)) continue;
      const uint2 q = load_quarter(queries + i * p.q_index.row_stride, t);
      query[half] = q.x;
      query[half + 2] = q.y;
      far_end[half] = tile.far_end(i);
      end[half] = tile.end(i);
    }
  }

  /// The lanes of a row's odd and even blocks together.
  __device__ static Log2Sum whole(Log2Sum sum) {
    sum.add({__shfl_xor_sync(kAll, sum.top, 1), __shfl_xor_sync(kAll, sum.sum, 1)});
    return sum;
  }
};

/// The far keys' log-masses of a pair of blocks of which other keys are a part; adds up near ones.
template <bool kMax, bool kNear>
__device__ __forceinline__ float mixed_pair(Rows& rows, const Tile& tile, const __half* keys,
                                            int key, int g, int t) {
  PairMass<kMax> far;
  PairMass<false> near;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int first = key + b * kBlock;
    const Scores scores =
        score(rows.query, load_keys<true>(keys, first, tile.end(tile.last), g, t));
    const auto is_far = [&](int half, int i) {
      return first + i >= tile.far_begin && first + i < rows.far_end[half];
    };
    far.take(b, scores, kLog2OfDot, t, is_far);
    if constexpr (kNear) {
      near.take(b, scores, kLog2OfDot, t, [&](int half, int i) {
        return first + i >= tile.start && first + i < rows.end[half] && !is_far(half, i);
      });
    }
  }
  if constexpr (kNear) rows.near.add(near.finish(kLog2OfDot, t));
  return far.finish(kLog2OfDot, t);
}

}  // namespace mma

/// kNear: near keys are scored too.
template <bool kMax, bool kNear>
__global__ __launch_bounds__(mma::kThreads, mma::kPerSm) void mma_scores_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w) {
  using namespace mma;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t chunk = blockIdx.x % w.chunks;
  const int64_t group = blockIdx.x / w.chunks * kWarps + threadIdx.x / 32;
  const int64_t groups = w.height / kRows;
  const int64_t slot = group / groups;
  if (slot >= w.pairs * w.tiles) return;
  const Tile tile = tile_of(p, w, slot);
  const int row = static_cast<int>(group % groups) * kRows;
  if (tile.empty() || row > tile.last || row + kRows <= tile.first) return;
  const Range blocks = chunk_blocks(w, scored_blocks(p, tile), chunk);
  if (blocks.end <= blocks.begin) return;

  Rows rows[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) rows[m].load(p, tile, row + 16 * m, g, t);
  // Up to here all rows see all keys behind the sinks as far.
  const bool full = tile.has(row) && tile.has(row + kRows - 1);
  const int common_end = full ? tile.far_end(row) : 0;
  const __half* keys = head_rows<const __half>(p.k_index, tile.batch, p.index_map.heads[tile.head]);
  for (int block = blocks.begin & ~1; block < blocks.end; block += 2) {
    const int key = block * kBlock;
    float mass[2];
    if (key >= tile.far_begin && key + kStep <= common_end) {
      PairMass<kMax> far[2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const Keys loaded = load_keys<false>(keys, key + b * kBlock, 0, g, t);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          far[m].take(b, score(rows[m].query, loaded), kLog2OfDot, t,
                      [](int, int) { return true; });
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) mass[m] = far[m].finish(kLog2OfDot, t);
    } else {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mass[m] = mixed_pair<kMax, kNear>(rows[m], tile, keys, key, g, t);
      }
    }
    const int own_block = block + t % 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      rows[m].far.add(mass[m]);
      if (own_block < w.blocks) w.mass(slot, own_block, rows[m].own) = mass[m];
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const Log2Sum far = Rows::whole(rows[m].far);
    const Log2Sum near = Rows::whole(rows[m].near);
    if (t % 2) continue;
    store(w.far + w.part(slot, chunk, rows[m].own), far);
    if constexpr (kNear) store(w.near + w.part(slot, chunk, rows[m].own), near);
  }
}

}  // namespace rtpurbo::cuda::tiles
