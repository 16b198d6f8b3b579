#pragma once
// One split of one set on the tensor cores: the set's heads are the 16 rows of a tile, keys its
// columns. Each warp works on its own tiles of 16 keys, which cp.async brings row by row, so warps
// meet only at the end.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/ldmatrix.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

constexpr int kMmaWarps = 4;
constexpr int kTileKeys = 16;

template <int kDim>
struct MmaTile {
  static constexpr int kStages = kDim <= 128 ? 3 : 2;
  static constexpr int kRowChunks = kDim / 8;  // of 16 bytes
  static constexpr int kTileBytes = kTileKeys * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kQueryBytes = DecodeSet::kMaxHeads * kDim * 2;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kQueryBytes + kMmaWarps * kWarpBytes;

  /// Address of 16-byte chunk c of a row; the swizzle keeps ldmatrix free of bank conflicts.
  __device__ static char* chunk(char* tile, int row, int c) {
    return tile + (row * kRowChunks + (c ^ (row & 7))) * 16;
  }
};

template <typename T, int kDim>
__global__ __launch_bounds__(32 * kMmaWarps) void decode_mma_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  using Tile = MmaTile<kDim>;
  constexpr int kSteps = kDim / 16;  // of the mma's depth, or of pairs of its columns
  constexpr int kLoads = kTileKeys * Tile::kRowChunks / 32;
  extern __shared__ __align__(128) char shared[];
  const DecodeSet& set = p.sets[blockIdx.y];
  const int split = blockIdx.x;
  const int64_t batch = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SetKeys keys(p, set, batch);
  const Range range = split_range(keys.total(), split, p.splits, kTileKeys * kMmaWarps);
  const HeadsView& k_view = set.from_local ? p.k_local : p.k;
  const HeadsView& v_view = set.from_local ? p.v_local : p.v;
  const T* k = head_rows<const T>(k_view, batch, set.kv_head);
  const T* v = head_rows<const T>(v_view, batch, set.kv_head);

  char* queries = shared;
  for (int i = threadIdx.x; i < DecodeSet::kMaxHeads * Tile::kRowChunks; i += 32 * kMmaWarps) {
    const int row = i / Tile::kRowChunks, c = i % Tile::kRowChunks;
    const bool used = row < set.heads_count;
    const int64_t head = used ? p.slot_heads[set.first_slot + row] : 0;
    const T* q = head_rows<const T>(p.q, batch, head) + c * 8;
    ptx::cp_async_16(Tile::chunk(queries, row, c), q, used);
  }

  char* stages = shared + Tile::kQueryBytes + warp * Tile::kWarpBytes;
  const int64_t first = range.begin + warp * kTileKeys;
  constexpr int64_t kStride = kMmaWarps * kTileKeys;
  const int64_t tiles = first < range.end ? (range.end - first + kStride - 1) / kStride : 0;
  // Row of this lane's key of a tile (lanes 16 and up repeat), -1 for none.
  const auto key_row = [&](int64_t tile) {
    const int64_t j = first + tile * kStride + lane % kTileKeys;
    return tile < tiles && j < range.end ? keys.row(j) : static_cast<int64_t>(-1);
  };
  const auto load = [&](int64_t tile, int64_t own_row) {
    if (tile < tiles) {
      char* stage = stages + static_cast<int>(tile % Tile::kStages) * Tile::kStageBytes;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int id = i * 32 + lane;
        const int row = id / Tile::kRowChunks, c = id % Tile::kRowChunks;
        const int64_t n = __shfl_sync(0xffffffffu, own_row, row);
        const int64_t safe = n < 0 ? 0 : n;
        ptx::cp_async_16(Tile::chunk(stage, row, c), k + safe * k_view.row_stride + c * 8, n >= 0);
        ptx::cp_async_16(Tile::chunk(stage + Tile::kTileBytes, row, c),
                         v + safe * v_view.row_stride + c * 8, n >= 0);
      }
    }
    ptx::cp_async_commit();
  };

  float out[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  const float scale = p.scale * kLog2E;
  // Lane's part of an ldmatrix address: row and 16-byte column of a 16 x 16 tile.
  const int matrix_row = lane % 16, matrix_column = lane / 16;

#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) load(s, key_row(s));
  ptx::cp_async_wait<Tile::kStages - 2>();
  __syncthreads();  // the queries, which came with the first tile
  int64_t next_row = key_row(Tile::kStages - 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t coming = next_row;
    next_row = key_row(tile + Tile::kStages);
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncwarp();
    load(tile + Tile::kStages - 1, coming);
    char* stage = stages + static_cast<int>(tile % Tile::kStages) * Tile::kStageBytes;

    float score[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, Tile::chunk(queries, matrix_row, 2 * step + matrix_column));
      ptx::ldmatrix_x4(b, Tile::chunk(stage, matrix_row, 2 * step + matrix_column));
      // b: keys 0-7 low depth, keys 8-15 low depth, keys 0-7 high depth, keys 8-15 high depth
      ptx::mma_m16n8k16<T>(score[0], a, b[0], b[2]);
      ptx::mma_m16n8k16<T>(score[1], a, b[1], b[3]);
    }
    // score[c]: rows lane / 4 and + 8; keys 8 c + 2 (lane % 4) and + 1
    const uint32_t seen = __ballot_sync(0xffffffffu, key_row(tile) >= 0);
    uint32_t weights[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float logit[4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool in = seen >> (8 * c + 2 * (lane % 4) + e) & 1;
          logit[2 * c + e] = in ? score[c][2 * half + e] * scale : -INFINITY;
        }
      }
      float largest = fmaxf(fmaxf(logit[0], logit[1]), fmaxf(logit[2], logit[3]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float new_top = fmaxf(top[half], largest);
      const float base = new_top == -INFINITY ? 0.0f : new_top;
      const float shrink = exp2f(top[half] - base);
      top[half] = new_top;
      float weight[4], sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[e] = exp2f(logit[e] - base);
        sum += weight[e];
      }
      total[half] = total[half] * shrink + sum;
      weights[half] = ptx::pack_pair<T>(weight[0], weight[1]);
      weights[2 + half] = ptx::pack_pair<T>(weight[2], weight[3]);
      if (shrink != 1.0f) {
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          out[i][2 * half] *= shrink;
          out[i][2 * half + 1] *= shrink;
        }
      }
    }
    char* values = stage + Tile::kTileBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Tile::chunk(values, matrix_row, 2 * step + matrix_column));
      // b: keys 0-7 and 8-15 of columns 0-7, then of columns 8-15
      ptx::mma_m16n8k16<T>(out[2 * step], weights, b[0], b[1]);
      ptx::mma_m16n8k16<T>(out[2 * step + 1], weights, b[2], b[3]);
    }
    __syncwarp();
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // Merge the warps: sums over lanes of a row first, then over warps through shared memory.
  float* warp_out = reinterpret_cast<float*>(shared + Tile::kQueryBytes);  // [warps, 16, kDim]
  float2* warp_stats = reinterpret_cast<float2*>(shared);                  // [warps, 16]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    const int row = lane / 4 + 8 * half;
    if (lane % 4 == 0) warp_stats[warp * 16 + row] = make_float2(top[half], total[half]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      float* to = warp_out + (warp * 16 + row) * kDim + 8 * i + 2 * (lane % 4);
      to[0] = out[i][2 * half];
      to[1] = out[i][2 * half + 1];
    }
  }
  __syncthreads();
  const int64_t place = (batch * p.splits + split) * p.slots_count + set.first_slot;
  for (int i = threadIdx.x; i < set.heads_count * kDim; i += 32 * kMmaWarps) {
    const int row = i / kDim, d = i % kDim;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kMmaWarps; ++w) largest = fmaxf(largest, warp_stats[w * 16 + row].x);
    const float base = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f, all = 0.0f;
#pragma unroll
    for (int w = 0; w < kMmaWarps; ++w) {
      const float2 stats = warp_stats[w * 16 + row];
      const float share = exp2f(stats.x - base);
      sum += share * warp_out[(w * 16 + row) * kDim + d];
      all += share * stats.y;
    }
    partials.sums[(place + row) * kDim + d] = sum;
    if (d == 0) partials.stats[place + row] = make_float2(largest, all);
  }
}

}  // namespace rtpurbo::cuda
