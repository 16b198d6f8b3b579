#pragma once
// Attention of float32 without tensor cores, which would round its operands: four warps of 4 rows
// each, 32 keys at a time. A lane holds the score of one key and kDim / 32 columns of the output.

#include "csrc/cuda/attention_tile.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {
namespace simt {

inline constexpr int kThreads = 128;
inline constexpr int kRows = 16;
inline constexpr int kWarpRows = kRows / (kThreads / 32);
inline constexpr int kKeys = 32;

/// Floats from one row of K to the next, so that 16-byte loads of 32 rows meet no bank twice.
template <int kDim>
inline constexpr int kKeyStride = kDim + 4;

/// Loads row_of(row) of `source` into rows [0, kCount), zeros where that is kNoKey and beyond
/// `dim`.
template <int kCount, int kDim, typename RowOf>
__device__ void load(float* tile, int tile_stride, const float* source, int64_t stride, int dim,
                     bool vectorized, const RowOf& row_of) {
  for (int i = threadIdx.x; i < kCount * kDim / 4; i += kThreads) {
    const int row = i / (kDim / 4);
    const int column = i % (kDim / 4) * 4;
    const int n = row_of(row);
    float4 values{0, 0, 0, 0};
    if (n != kNoKey && column < dim) {
      const float* from = source + n * stride + column;
      values = vectorized ? *reinterpret_cast<const float4*>(from)
                          : float4{from[0], from[1], from[2], from[3]};
    }
    *reinterpret_cast<float4*>(tile + row * tile_stride + column) = values;
  }
}

__device__ inline float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <int kDim, bool kValues>
__global__ __launch_bounds__(kThreads) void attention_kernel(
    const __grid_constant__ AttentionParams params, const __grid_constant__ TileGrid grid) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int positions[kKeys];
  float* const q_tile = reinterpret_cast<float*>(shared);
  float* const k_tile = q_tile + kRows * kDim;
  float* const v_tile = k_tile + kKeys * kKeyStride<kDim>;

  const RowTile tile = row_tile<kRows>(params, grid);
  if (tile.height <= 0) return;
  const TileKeys keys = tile_keys(params, tile);
  const HeadJob& job = tile.job;
  const HeadsView& k_view = job.from_local ? params.k_local : params.k;
  const HeadsView& v_view = job.from_local ? params.v_local : params.v;
  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x / 32 * kWarpRows;  // of the warp
  const float factor = params.scale * kLog2E;
  const auto position = [&](int row) { return positions[row]; };

  load<kRows, kDim>(q_tile, kDim, head_rows<const float>(params.q, tile.batch, job.head),
                    params.q.row_stride, params.dim, params.vectorized,
                    [&](int row) { return row < tile.height ? tile.row + row : kNoKey; });
  float maximum[kWarpRows], sum[kWarpRows], out[kWarpRows][kDim / 32];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    maximum[r] = -INFINITY;
    sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) out[r][i] = 0.0f;
  }

  for (int begin = 0; begin < keys.count; begin += kKeys) {
    __syncthreads();
    if (threadIdx.x < kKeys) positions[threadIdx.x] = keys.position(begin + threadIdx.x);
    __syncthreads();
    load<kKeys, kDim>(k_tile, kKeyStride<kDim>,
                      head_rows<const float>(k_view, tile.batch, job.kv_head), k_view.row_stride,
                      params.dim, params.vectorized, position);
    if constexpr (kValues) {
      load<kKeys, kDim>(v_tile, kDim, head_rows<const float>(v_view, tile.batch, job.kv_head),
                        v_view.row_stride, params.dim, params.vectorized, position);
    }
    __syncthreads();

    float scores[kWarpRows] = {};
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
      const float4 key = *reinterpret_cast<const float4*>(k_tile + lane * kKeyStride<kDim> + d);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const float4 query = *reinterpret_cast<const float4*>(q_tile + (first_row + r) * kDim + d);
        scores[r] = fmaf(query.x, key.x, scores[r]);
        scores[r] = fmaf(query.y, key.y, scores[r]);
        scores[r] = fmaf(query.z, key.z, scores[r]);
        scores[r] = fmaf(query.w, key.w, scores[r]);
      }
    }

    unsigned seen[kWarpRows];  // keys that a row sees
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const bool sees = keys.sees(tile.position + first_row + r, positions[lane]);
      seen[r] = __ballot_sync(~0u, sees);
      const float score = sees ? scores[r] : -INFINITY;
      const float top = fmaxf(maximum[r], warp_max(score));
      const float shift = softmax_shift(top);
      const float decay = exp2f((maximum[r] - shift) * factor);
      scores[r] = exp2f((score - shift) * factor);
      maximum[r] = top;
      sum[r] = sum[r] * decay + scores[r];
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) out[r][i] *= decay;
    }
    if constexpr (kValues) {
#pragma unroll 2
      for (int key = 0; key < kKeys; ++key) {
        float value[kDim / 32];
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) value[i] = v_tile[key * kDim + 32 * i + lane];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const float weight = __shfl_sync(~0u, scores[r], key);
          if (!(seen[r] >> key & 1)) continue;  // 0 * inf is NaN
#pragma unroll
          for (int i = 0; i < kDim / 32; ++i) out[r][i] = fmaf(weight, value[i], out[r][i]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = first_row + r;
    const float total = warp_sum(sum[r]);
    if (row >= tile.height) continue;
    if (lane == 0) {
      params
          .lse_ptr[(tile.batch * params.lse_heads + job.lse_head) * params.rows + tile.row + row] =
          SoftmaxSum{maximum[r], total}.lse(params.scale);
    }
    if constexpr (kValues) {
      float* to = head_rows<float>(params.out, tile.batch, job.head) +
                  (tile.row + row) * params.out.row_stride;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        const int d = 32 * i + lane;
        if (d < params.dim) to[d] = total == 0.0f ? 0.0f : out[r][i] / total;
      }
    }
  }
}

}  // namespace simt

template <int kDim>
cudaError_t launch_attention_simt(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kQueriesAndKeys =
      (simt::kRows * kDim + simt::kKeys * simt::kKeyStride<kDim>)*sizeof(float);
  constexpr int kValueBytes = simt::kKeys * kDim * sizeof(float);
  return params.out.ptr
             ? launch_tiles<simt::kRows>(simt::attention_kernel<kDim, true>, params, simt::kThreads,
                                         kQueriesAndKeys + kValueBytes, stream)
             : launch_tiles<simt::kRows>(simt::attention_kernel<kDim, false>, params,
                                         simt::kThreads, kQueriesAndKeys, stream);
}

}  // namespace rtpurbo::cuda
