#pragma once
// Stage 1 by tensor cores (sm_80): fp16 queries and keys of 16 dimensions, blocks of 64 keys. A
// warp scores 16 rows, two blocks at a time. It needs no shared memory: the order of the dimensions
// is free as long as both operands agree, so a lane loads its part of a key in one piece.

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/select_tiles/row_parts.cuh"

namespace rtpurbo::cuda::tiles {

namespace mma {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;  // of a warp
constexpr int kDim = 16;
constexpr int kBlock = 64;
constexpr int kStep = 2 * kBlock;
constexpr unsigned kAll = 0xffffffffu;

/// Scores of 16 rows and 64 keys: with g = lane / 4 and t = lane % 4, of row g + 8 half and key
/// 8 j + 2 t + e in at[j][2 half + e].
struct Scores {
  float at[8][4];
};

/// Four dimensions of a row, 4 t and on.
__device__ __forceinline__ uint2 load_quarter(const __half* row, int t) {
  return __ldg(reinterpret_cast<const uint2*>(row) + t);
}

/// Keys at or behind `end` score as zeros; they are not read.
template <bool kGuarded>
__device__ __forceinline__ Scores score(const uint32_t (&query)[4], const __half* keys,
                                        int64_t stride, int key, int end, int g, int t) {
  Scores scores = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int n = key + 8 * j + g;
    uint2 k = {};
    if (!kGuarded || n < end) k = load_quarter(keys + n * stride, t);
    ptx::mma_m16n8k16<__half>(scores.at[j], query, k.x, k.y);
  }
  return scores;
}

/// The larger, or NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

/// Of four values a lane, sums (or maxima) over the four lanes of a quad: lane t gets that of
/// value t.
template <typename Op>
__device__ __forceinline__ float share_out(const float (&v)[4], int t, Op op) {
  const bool high = t & 2, odd = t & 1;
  const float a = op(high ? v[2] : v[0], __shfl_xor_sync(kAll, high ? v[0] : v[2], 2));
  const float b = op(high ? v[3] : v[1], __shfl_xor_sync(kAll, high ? v[1] : v[3], 2));
  return op(odd ? b : a, __shfl_xor_sync(kAll, odd ? a : b, 1));
}

/// What a lane makes of a pair of blocks; value 2 half + block.
template <bool kMax>
struct PairMass {
  float top[4];
  float sum[4];

  /// Takes in the scores for which keep(half, key of the block) holds.
  template <typename Keep>
  __device__ void take(int block, const Scores& scores, float factor, int t, const Keep& keep) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float s = scores.at[i / 2][2 * half + i % 2];
        if (!keep(half, i / 2 * 8 + 2 * t + i % 2)) continue;
        largest = kMax ? max_or_nan(largest, s) : fmaxf(largest, s);
      }
      const int v = 2 * half + block;
      top[v] = largest;
      if constexpr (kMax) continue;
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
      top[v] = softmax_shift(largest) * factor;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float s = scores.at[i / 2][2 * half + i % 2];
        const float weight = fast_exp2(fmaf(s, factor, -top[v]));
        if (keep(half, i / 2 * 8 + 2 * t + i % 2)) total += weight;
      }
      sum[v] = total;
    }
  }

  /// Lane t gets the log-mass of value t.
  __device__ float finish(float factor, int t) const {
    if constexpr (kMax) return factor * share_out(top, t, max_or_nan);
    const float total = share_out(sum, t, [](float a, float b) { return a + b; });
    const float base = t & 2 ? (t & 1 ? top[3] : top[2]) : (t & 1 ? top[1] : top[0]);
    return base + __log2f(total);
  }
};

}  // namespace mma

/// kNear: near keys are scored too.
template <bool kMax, bool kNear>
__global__ __launch_bounds__(mma::kThreads,
                             2) void mma_scores_kernel(const __grid_constant__ SelectTilesParams p,
                                                       const __grid_constant__ Workspace w) {
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
  const Range blocks = chunk_blocks(scored_blocks(p, tile), chunk);
  if (blocks.end <= blocks.begin) return;

  const __half* queries = head_rows<const __half>(p.q_index, tile.batch, tile.head) +
                          tile.number * p.tile * p.q_index.row_stride;
  const __half* keys = head_rows<const __half>(p.k_index, tile.batch, p.index_map.heads[tile.head]);
  const int64_t stride = p.k_index.row_stride;
  uint32_t query[4] = {};
  int far_end[2], end[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + g + 8 * half;
    far_end[half] = end[half] = 0;
    if (!tile.has(i)) continue;
    const uint2 q = load_quarter(queries + i * p.q_index.row_stride, t);
    query[half] = q.x;
    query[half + 2] = q.y;
    far_end[half] = tile.far_end(i);
    end[half] = tile.end(i);
  }
  // Keys that all rows see as far, and those that any does.
  const bool whole = tile.has(row) && tile.has(row + kRows - 1);
  const int common_end = whole ? tile.far_end(row) : 0;
  const int last_far_end = tile.far_end(min(row + kRows - 1, tile.last));
  const float factor = kLog2E / 4.0f;  // kDim^-1/2, to base 2

  Log2Sum far, near;
  const int own_row = row + g + 8 * (t / 2);
  for (int block = blocks.begin & ~1; block < blocks.end; block += 2) {
    const int key = block * kBlock;
    PairMass<kMax> mass;
    float log2_mass = -INFINITY;
    if (key >= tile.far_begin && key + kStep <= common_end) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const Scores scores = score<false>(query, keys, stride, key + b * kBlock, 0, g, t);
        mass.take(b, scores, factor, t, [](int, int) { return true; });
      }
      log2_mass = mass.finish(factor, t);
    } else {
      const bool some_far = key + kStep > tile.far_begin && key < last_far_end;
      PairMass<false> near_mass;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int first = key + b * kBlock;
        const Scores scores = score<true>(query, keys, stride, first, tile.end(tile.last), g, t);
        const auto is_far = [&](int half, int i) {
          return first + i >= tile.far_begin && first + i < far_end[half];
        };
        mass.take(b, scores, factor, t, is_far);
        if constexpr (kNear) {
          near_mass.take(b, scores, factor, t, [&](int half, int i) {
            return first + i >= tile.start && first + i < end[half] && !is_far(half, i);
          });
        }
      }
      if (some_far) log2_mass = mass.finish(factor, t);
      if constexpr (kNear) near.add(near_mass.finish(factor, t));
    }
    far.add(log2_mass);
    const int own_block = block + t % 2;
    if (own_block < w.blocks) w.masses[w.mass(slot, own_block, own_row)] = log2_mass;
  }
  const auto merge = [](Log2Sum sum) {
    sum.add({__shfl_xor_sync(kAll, sum.top, 1), __shfl_xor_sync(kAll, sum.sum, 1)});
    return sum;
  };
  far = merge(far);
  near = merge(near);
  if (t % 2) return;
  store(w.far + w.part(slot, chunk, own_row), far);
  if constexpr (kNear) store(w.near + w.part(slot, chunk, own_row), near);
}

}  // namespace rtpurbo::cuda::tiles
