#pragma once
// One split of one set on the tensor cores: 16 keys are the rows of a product, the set's heads its
// 8 columns. Each warp works on its own tiles of keys, which cp.async brings row by row, so warps
// meet only at the end.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/decode/mma_tile.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/grid_dependency.cuh"
#include "csrc/cuda/ptx/ldmatrix.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/ptx/movmatrix.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

/// By all 32 kWarps threads of a block, with kSharedBytes of shared memory.
template <typename T, int kDim, int kWarps, int kStages, bool kAllKinds, int kKeys = kProductKeys>
__device__ void attend_split(const DecodeParams& p, const DecodeSet& set, int64_t batch, int split,
                             const Partials& partials, char* shared) {
  using Tile = MmaTile<kDim, kWarps, kStages, kKeys>;
  constexpr int kSteps = kDim / 16;  // of the mma's depth, or of pairs of its columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SetKeys<int, kAllKinds> keys(p, set, batch);
  const Range<int> range = split_range(keys.total(), split, p.splits, kKeys * kWarps);
  const HeadsView& k_view = set.from_local ? p.k_local : p.k;
  const HeadsView& v_view = set.from_local ? p.v_local : p.v;
  const T* k = head_rows<const T>(k_view, batch, set.kv_head);
  const T* v = head_rows<const T>(v_view, batch, set.kv_head);

  char* queries = shared;
  const auto copy_queries = [&] {  // behind keys, which take longer to come
    constexpr uint32_t kChunks = DecodeSet::kMaxHeads * Tile::kRowChunks;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kChunks; i += 32 * kWarps) {
      const int row = i / Tile::kRowChunks, c = i % Tile::kRowChunks;
      const bool used = row < set.heads_count;
      const int64_t head = used ? p.slot_heads[set.first_slot + row] : 0;
      const T* q = head_rows<const T>(p.q, batch, head) + c * 8;
      ptx::cp_async_16(queries + Tile::chunk(row, c), q, used);
    }
  };

  char* stages = shared + Tile::kQueryBytes + warp * Tile::kWarpBytes;
  const RowCopies<T, Tile> copies(k, k_view.row_stride, v, v_view.row_stride);
  constexpr int kStride = kWarps * kKeys;
  const int first = range.begin + warp * kKeys;
  // Row of this lane's key of the tile that begins at a position (lanes beyond repeat), -1 for
  // none.
  const auto key_row = [&](int position) {
    const int j = position + lane % kKeys;
    return j < range.end ? keys.row(j) : -1;
  };
  constexpr int kAhead = kStages > 1 ? kStages - 1 : 1;  // tiles on their way
  uint32_t seen[kAhead + 1];  // whether the lanes' keys of these tiles, and of the current one, are
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    const int position = first + s * kStride, row = key_row(position);
    seen[s] = __ballot_sync(0xffffffffu, row >= 0);
    if (position < range.end) copies.begin(stages + s * Tile::kStageBytes, row);
    if (s == 0) copy_queries();
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kAhead - 1>();
  __syncthreads();       // the queries, which came with the first tile
  float out[kSteps][4];  // rows: 16 dimensions each, columns: heads
#pragma unroll
  for (int i = 0; i < kSteps; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  // Of the lane's heads 2 (lane % 4) and + 1.
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  const float scale = p.scale * kLog2E;

  uint32_t query[kSteps][2];
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    uint32_t loaded[4];
    ptx::ldmatrix_x4(loaded, queries + Tile::chunk(lane % 8, 2 * step + lane / 8));
    query[step][0] = loaded[0];
    query[step][1] = loaded[1];
    query[step + 1][0] = loaded[2];
    query[step + 1][1] = loaded[3];
  }
  // Of its two columns, those of heads that read only near keys; other heads' far keys may have
  // left a NaN there.
  const int first_near = set.heads_count - set.near_heads;
  const bool near_only[2] = {2 * (lane % 4) >= first_near, 2 * (lane % 4) + 1 >= first_near};
  const auto clear_near_only = [&] {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (near_only[h]) out[i][h] = out[i][2 + h] = 0.0f;
      }
    }
  };
  bool far = kAllKinds && set.near_heads > 0;  // so far only those
  // Of the lane's first chunks in a tile, of keys and of values.
  const int key_chunk = Tile::chunk(lane % 16, lane / 16);
  const int value_chunk = Tile::kTileBytes + Tile::chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int next_row = key_row(first + kAhead * kStride);
  char* stage = stages;
  char* free_stage = stages + (kStages - 1) * Tile::kStageBytes;  // of the tile before
#pragma unroll 1
  for (int position = first; position < range.end; position += kStride) {
    const int coming = position + kAhead * kStride, row = next_row;
    next_row = key_row(coming + kStride);
    seen[kAhead] = __ballot_sync(0xffffffffu, row >= 0);
    ptx::cp_async_wait<kAhead - 1>();
    __syncwarp();
    const auto load = [&] {
      if (coming < range.end) copies.begin(free_stage, row);
      ptx::cp_async_commit();
    };
    if constexpr (kStages > 1) load();

    float score[Tile::kProducts][4] = {};  // keys lane / 4 and + 8 of two heads each
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int part = 0; part < Tile::kProducts; ++part) {
        uint32_t a[4];
        ptx::ldmatrix_x4(
            a, stage + part * kProductKeys * Tile::kRowBytes + Tile::step_on(key_chunk, step));
        ptx::mma_m16n8k16<T>(score[part], a, query[step][0], query[step][1]);
      }
    }
    const uint32_t own_seen = seen[0] >> (lane / 4);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) seen[s] = seen[s + 1];
    if (far && position >= keys.far()) {
      far = false;
      clear_near_only();
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool hidden = far && near_only[h];
      float largest = -INFINITY;
#pragma unroll
      for (int key = 0; key < 2 * Tile::kProducts; ++key) {
        float& own = score[key / 2][key % 2 * 2 + h];
        own = (own_seen >> key * 8 & 1) != 0 && !hidden ? own * scale : -INFINITY;
        largest = fmaxf(largest, own);
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
      const float new_top = fmaxf(top[h], largest);
      const float base = softmax_shift(new_top);
      shrink[h] = fast_exp2(top[h] - base);
      top[h] = new_top;
      total[h] *= shrink[h];
#pragma unroll
      for (int key = 0; key < 2 * Tile::kProducts; ++key) {
        float& own = score[key / 2][key % 2 * 2 + h];
        own = fast_exp2(own - base);
        total[h] += own;
      }
    }
    if (shrink[0] != 1.0f || shrink[1] != 1.0f) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        out[i][0] *= shrink[0];
        out[i][1] *= shrink[1];
        out[i][2] *= shrink[0];
        out[i][3] *= shrink[1];
      }
    }
#pragma unroll
    for (int part = 0; part < Tile::kProducts; ++part) {
      const float(&weight)[4] = score[part];
      const uint32_t low = ptx::transpose_8x8(ptx::pack_pair<T>(weight[0], weight[1]));
      const uint32_t high = ptx::transpose_8x8(ptx::pack_pair<T>(weight[2], weight[3]));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(
            a, stage + part * kProductKeys * Tile::kRowBytes + Tile::step_on(value_chunk, step));
        ptx::mma_m16n8k16<T>(out[step], a, low, high);
      }
    }
    __syncwarp();
    if constexpr (kStages == 1) load();
    free_stage = stage;
    stage =
        stage + Tile::kStageBytes == stages + Tile::kWarpBytes ? stages : stage + Tile::kStageBytes;
  }
  if (far) clear_near_only();
  ptx::cp_async_wait<0>();
  __syncthreads();

  // Merge the warps: sums over the lanes of a head first, then over warps through shared memory.
  float* warp_out = reinterpret_cast<float*>(shared + Tile::kQueryBytes);  // [warps, 8, stride]
  float2* warp_stats = reinterpret_cast<float2*>(shared);                  // [warps, 8]
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      total[h] += __shfl_xor_sync(0xffffffffu, total[h], step);
    }
    const int place = warp * DecodeSet::kMaxHeads + 2 * (lane % 4) + h;
    if (lane < 4) warp_stats[place] = make_float2(top[h], total[h]);
    float* to = warp_out + place * Tile::kSumStride + lane / 4;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      to[16 * i] = out[i][h];
      to[16 * i + 8] = out[i][2 + h];
    }
  }
  __syncthreads();
  const int64_t place = (batch * p.splits + split) * p.slots_count + set.first_slot;
  constexpr int kRun = 8;  // dimensions that a thread puts together, 16 bytes of an output
  constexpr int kRuns = kDim / kRun;
  for (int i = threadIdx.x; i < set.heads_count * kRuns; i += 32 * kWarps) {
    const int head = i / kRuns, d = i % kRuns * kRun;
    float2 stats[kWarps];
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      stats[w] = warp_stats[w * DecodeSet::kMaxHeads + head];
      largest = fmaxf(largest, stats[w].x);
    }
    const float base = softmax_shift(largest);
    alignas(16) float sums[kRun] = {};
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float share = fast_exp2(stats[w].x - base);
      all += share * stats[w].y;
      const float* from = warp_out + (w * DecodeSet::kMaxHeads + head) * Tile::kSumStride + d;
#pragma unroll
      for (int j = 0; j < kRun; ++j) sums[j] += share * from[j];
    }
    if (kAllKinds && p.has_whole_heads()) {
      const int64_t number = p.slot_heads[set.first_slot + head];
      const float scale_out = all == 0.0f ? 0.0f : 1.0f / all;
      alignas(16) uint32_t packed[kRun / 2];
#pragma unroll
      for (int j = 0; j < kRun / 2; ++j) {
        packed[j] = ptx::pack_pair<T>(sums[2 * j] * scale_out, sums[2 * j + 1] * scale_out);
      }
      *reinterpret_cast<uint4*>(head_rows<T>(p.out, batch, number) + d) =
          *reinterpret_cast<const uint4*>(packed);
      if (d == 0) p.lse_ptr[batch * p.heads + number] = lse_of_octaves(largest, all);
      continue;
    }
    float4* to = reinterpret_cast<float4*>(partials.sums + (place + head) * kDim + d);
#pragma unroll
    for (int j = 0; j < kRun / 4; ++j) to[j] = reinterpret_cast<const float4*>(sums)[j];
    if (d == 0) partials.stats[place + head] = make_float2(largest, all);
  }
}

template <typename T, int kDim, int kWarps, int kStages, int kKeys>
__global__ __launch_bounds__(32 *
                             kWarps) void decode_mma_kernel(const __grid_constant__ DecodeParams p,
                                                            Partials partials) {
  extern __shared__ __align__(128) char shared[];
  ptx::let_next_kernel_begin();
  attend_split<T, kDim, kWarps, kStages, true, kKeys>(
      p, p.sets[blockIdx.y], blockIdx.z, static_cast<int>(blockIdx.x), partials, shared);
}

}  // namespace rtpurbo::cuda
