// Bound by reading K: a few lanes share a key, 16 bytes each, with several keys on their way.
// Blocks write the (maximum, sum) of their keys; a second kernel merges these in order.

#include "csrc/cuda/attention_tile.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/near_lse.h"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 8;     // elements of a lane
constexpr int kSplit = 64;    // keys of a block
constexpr int kInFlight = 8;  // keys that a lane loads at a time

template <typename T>
struct alignas(16) Chunk {
  T values[kChunk];
};

template <typename T>
__device__ Chunk<T> load_chunk(const T* from, bool vectorized) {
  Chunk<T> chunk;
  if (vectorized) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(chunk) / 16); ++i) {
      reinterpret_cast<uint4*>(&chunk)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk.values[i] = from[i];
  }
  return chunk;
}

/// `row` counts the query rows of all near jobs and sequences.
__device__ RowTile single_row(const AttentionParams& params, int64_t row) {
  RowTile tile{};
  tile.row = static_cast<int32_t>(row % params.rows);
  row /= params.rows;
  tile.job = params.heads.jobs[row % params.heads.near];
  tile.batch = row / params.heads.near;
  tile.height = 1;
  tile.position = params.keys - params.rows + tile.row;
  return tile;
}

__device__ float* lse_of(const AttentionParams& params, const RowTile& tile) {
  return params.lse_ptr + (tile.batch * params.lse_heads + tile.job.lse_head) * params.rows +
         tile.row;
}

/// Merges the sums of lanes that differ in the bits from `step` on.
__device__ SoftmaxSum merge_lanes(SoftmaxSum sum, int step, float factor) {
  for (; step < 32; step *= 2) {
    sum.merge({__shfl_xor_sync(~0u, sum.maximum, step), __shfl_xor_sync(~0u, sum.sum, step)},
              factor);
  }
  return sum;
}

template <typename T, int kLanes>
__global__ __launch_bounds__(kThreads) void split_kernel(
    const __grid_constant__ AttentionParams params, int splits, float2* partials) {
  constexpr int kGroups = kThreads / kLanes;  // keys that the block reads side by side
  __shared__ float2 warp_sums[kWarps];
  const int64_t row = blockIdx.x / splits;
  const int split = static_cast<int>(blockIdx.x % splits);
  const RowTile tile = single_row(params, row);
  const TileKeys keys = tile_keys(params, tile);
  const int begin = split * kSplit;
  const int end = min(begin + kSplit, keys.count);
  const int group = threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * kChunk;
  const bool active = column < params.dim;
  const T* k = head_rows<const T>(params.k, tile.batch, tile.job.kv_head) + column;
  const float factor = params.scale * kLog2E;

  float query[kChunk] = {};
  if (active) {
    const T* q = head_rows<const T>(params.q, tile.batch, tile.job.head) +
                 tile.row * params.q.row_stride + column;
    const Chunk<T> chunk = load_chunk(q, params.vectorized);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) query[i] = to_float(chunk.values[i]);
  }

  SoftmaxSum sum;
  for (int first = begin; first < end; first += kGroups * kInFlight) {
    Chunk<T> chunks[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kGroups + group;
      if (i < end && active) {
        chunks[j] = load_chunk(k + keys.position(i) * params.k.row_stride, params.vectorized);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) chunks[j].values[e] = from_float<T>(0.0f);
      }
    }
    float scores[kInFlight];
    float top = sum.maximum;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      float score = 0.0f;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) score = fmaf(query[e], to_float(chunks[j].values[e]), score);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        score += __shfl_xor_sync(~0u, score, offset);
      }
      scores[j] = first + j * kGroups + group < end ? score : -INFINITY;
      top = fmaxf(top, scores[j]);
    }
    const float shift = softmax_shift(top);
    sum.sum *= exp2f((sum.maximum - shift) * factor);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sum.sum += exp2f((scores[j] - shift) * factor);
    sum.maximum = top;
  }

  sum = merge_lanes(sum, kLanes, factor);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = {sum.maximum, sum.sum};
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sum.merge({warp_sums[warp].x, warp_sums[warp].y}, factor);
  }
  if (splits == 1) {
    *lse_of(params, tile) = sum.lse(params.scale);
  } else {
    partials[blockIdx.x] = {sum.maximum, sum.sum};
  }
}

/// One warp a row.
__global__ __launch_bounds__(kThreads) void merge_kernel(
    const __grid_constant__ AttentionParams params, int splits, const float2* partials,
    int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const float factor = params.scale * kLog2E;
  SoftmaxSum sum;
  for (int split = threadIdx.x % 32; split < splits; split += 32) {
    const float2 part = partials[row * splits + split];
    sum.merge({part.x, part.y}, factor);
  }
  sum = merge_lanes(sum, 1, factor);
  if (threadIdx.x % 32 == 0) *lse_of(params, single_row(params, row)) = sum.lse(params.scale);
}

template <typename T>
cudaError_t launch(const AttentionParams& params, float* partials_ptr, cudaStream_t stream) {
  const auto kernel = params.dim <= 64    ? split_kernel<T, 8>
                      : params.dim <= 128 ? split_kernel<T, 16>
                                          : split_kernel<T, 32>;
  const int64_t splits = near_lse_splits(params);
  const int64_t rows = params.batch * params.heads.near * params.rows;
  if (rows == 0) return cudaSuccess;
  if (rows * splits > INT_MAX) return cudaErrorInvalidConfiguration;
  float2* partials = reinterpret_cast<float2*>(partials_ptr);
  kernel<<<static_cast<unsigned>(rows * splits), kThreads, 0, stream>>>(
      params, static_cast<int>(splits), partials);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess || splits == 1) {
    return error;
  }
  merge_kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
      params, static_cast<int>(splits), partials, rows);
  return cudaGetLastError();
}

}  // namespace

int64_t near_lse_splits(const AttentionParams& params) {
  const int64_t near = static_cast<int64_t>(params.window) + params.sinks;
  const int64_t keys = near < params.keys ? near : params.keys;
  return keys > kSplit ? (keys + kSplit - 1) / kSplit : 1;
}

cudaError_t launch_near_lse(const AttentionParams& params, float* partials_ptr,
                            cudaStream_t stream) {
  if (params.dim > kMaxHeadDim) return cudaErrorInvalidValue;
  AttentionParams checked = params;
  checked.vectorized = rows_are_aligned(params);
  return dispatch_element(params.type, [&](auto element) {
    return launch<decltype(element)>(checked, partials_ptr, stream);
  });
}

}  // namespace rtpurbo::cuda
