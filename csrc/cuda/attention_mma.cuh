#pragma once
// Attention of 16-bit types by tensor cores, after FlashAttention-2: four warps of 16 rows each, 64
// keys at a time. K of the next keys loads while the softmax and P V of these run, V while Q K^T.

#include "csrc/cuda/attention_tile.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/ldmatrix.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {
namespace mma {

inline constexpr int kThreads = 128;
inline constexpr int kRows = 64;
inline constexpr int kKeys = 64;
inline constexpr int kChunk = 8;  // elements of 16 bytes

/// A [64, kDim] tile in shared memory whose 16-byte chunks are permuted within a row, so that eight
/// rows of one chunk lie in different banks.
template <typename T, int kDim>
struct SharedTile {
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kBytes = kRows * kDim * sizeof(T);
  T* data;

  __device__ T* at(int row, int chunk) const {
    return data + row * kDim + ((chunk ^ (row & 7)) * kChunk);
  }

  /// Loads row_of(row) of `source` into each row, zeros where that is kNoKey and beyond `dim`.
  template <typename RowOf>
  __device__ void load(const T* source, int64_t stride, int dim, bool vectorized,
                       const RowOf& row_of) const {
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const int n = row_of(row);
      const bool valid = n != kNoKey && chunk * kChunk < dim;
      const T* from = source + (valid ? n * stride + chunk * kChunk : 0);
      if (vectorized) {
        ptx::cp_async_16(at(row, chunk), from, valid);
      } else {
        alignas(16) T values[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) values[e] = valid ? from[e] : from_float<T>(0.0f);
        *reinterpret_cast<uint4*>(at(row, chunk)) = *reinterpret_cast<const uint4*>(values);
      }
    }
  }
};

/// Whether one of the two elements of a register is infinite or NaN.
template <typename T>
__device__ bool has_non_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

/// State of a thread's two rows, g = lane / 4 and g + 8 of its warp: column pairs 8 j + 2 (lane %
/// 4) of the output.
template <typename T, int kDim>
struct Rows {
  float out[kDim / 8][4];
  float maximum[2];
  float sum[2];  // of this thread's columns only
};

/// Turns scores into weights and updates the rows' state.
template <typename T, int kDim, bool kValues>
__device__ void soften(float (&scores)[8][4], Rows<T, kDim>& rows, float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = rows.maximum[half];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float shift = softmax_shift(top) * factor;
    const float decay = fast_exp2(rows.maximum[half] * factor - shift);
    float sum = rows.sum[half] * decay;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        scores[j][e] = fast_exp2(fmaf(scores[j][e], factor, -shift));
        sum += scores[j][e];
      }
    }
    rows.maximum[half] = top;
    rows.sum[half] = sum;
    if constexpr (kValues) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        rows.out[j][2 * half] *= decay;
        rows.out[j][2 * half + 1] *= decay;
      }
    }
  }
}

/// Marks the rows of a tile that hold a value that is not finite; whether there is one.
template <typename T, int kDim>
__device__ bool find_poisoned(const SharedTile<T, kDim>& values, int* poisoned) {
  bool found = false;
  for (int i = threadIdx.x; i < kKeys * values.kChunks; i += kThreads) {
    const uint4 chunk = reinterpret_cast<const uint4*>(values.data)[i];
    if (has_non_finite<T>(chunk.x) || has_non_finite<T>(chunk.y) || has_non_finite<T>(chunk.z) ||
        has_non_finite<T>(chunk.w)) {
      poisoned[i / values.kChunks] = 1;
      found = true;
    }
  }
  return found;
}

/// Adds the marked rows of V to the rows of the output that see them. 0 * inf is NaN, so the tensor
/// cores must not meet these values.
template <typename T, int kDim>
__device__ void add_poisoned(const SharedTile<T, kDim>& values, const int* poisoned,
                             const int* positions, const TileKeys& keys, int first_m,
                             const float (&weights)[8][4], Rows<T, kDim>& rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll 1
    for (int column = 0; column < 8; ++column) {
      const int key = 8 * j + column;
      if (!poisoned[key]) continue;
      const int owner = (lane & ~3) | (column >> 1);
      const float upper = __shfl_sync(~0u, column & 1 ? weights[j][1] : weights[j][0], owner);
      const float lower = __shfl_sync(~0u, column & 1 ? weights[j][3] : weights[j][2], owner);
      const bool upper_sees = keys.sees(first_m, positions[key]);
      const bool lower_sees = keys.sees(first_m + 8, positions[key]);
#pragma unroll
      for (int chunk = 0; chunk < kDim / 8; ++chunk) {
        const T* pair = values.at(key, chunk) + 2 * (lane % 4);
        const float low = to_float(pair[0]);
        const float high = to_float(pair[1]);
        if (upper_sees) {
          rows.out[chunk][0] += upper * low;
          rows.out[chunk][1] += upper * high;
        }
        if (lower_sees) {
          rows.out[chunk][2] += lower * low;
          rows.out[chunk][3] += lower * high;
        }
      }
    }
  }
}

template <typename T, int kDim>
__device__ void clear_poisoned(const SharedTile<T, kDim>& values, const int* poisoned) {
  for (int i = threadIdx.x; i < kKeys * values.kChunks; i += kThreads) {
    if (poisoned[i / values.kChunks]) reinterpret_cast<uint4*>(values.data)[i] = uint4{0, 0, 0, 0};
  }
}

/// The part of A that a warp multiplies: rows 16 warp to + 15, columns 16 step to + 15.
template <typename T, int kDim>
__device__ void load_queries(uint32_t (&a)[4], const SharedTile<T, kDim>& queries, int step) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, queries.at(threadIdx.x / 32 * 16 + lane % 16, 2 * step + lane / 16));
}

/// scores += A(step) K^T for the 64 keys.
template <typename T, int kDim>
__device__ void multiply_keys(float (&scores)[8][4], const uint32_t (&a)[4],
                              const SharedTile<T, kDim>& keys, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, keys.at(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    ptx::mma_m16n8k16<T>(scores[2 * pair], a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(scores[2 * pair + 1], a, b[2], b[3]);
  }
}

/// out += weights V.
template <typename T, int kDim>
__device__ void multiply_values(Rows<T, kDim>& rows, const float (&weights)[8][4],
                                const SharedTile<T, kDim>& values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    const float(&left)[4] = weights[2 * step];
    const float(&right)[4] = weights[2 * step + 1];
    const uint32_t a[4] = {ptx::pack_pair<T>(left[0], left[1]), ptx::pack_pair<T>(left[2], left[3]),
                           ptx::pack_pair<T>(right[0], right[1]),
                           ptx::pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, values.at(16 * step + lane % 16, 2 * pair + lane / 16));
      ptx::mma_m16n8k16<T>(rows.out[2 * pair], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(rows.out[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

template <typename T, int kDim, bool kValues>
__device__ void store(const AttentionParams& params, const RowTile& tile,
                      const Rows<T, kDim>& rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
    if (row >= tile.height) continue;
    if (lane % 4 == 0) {
      params.lse_ptr[(tile.batch * params.lse_heads + tile.job.lse_head) * params.rows + tile.row +
                     row] = SoftmaxSum{rows.maximum[half], sum}.lse(params.scale);
    }
    if constexpr (kValues) {
      T* out = head_rows<T>(params.out, tile.batch, tile.job.head) +
               (tile.row + row) * params.out.row_stride + 2 * (lane % 4);
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        if (8 * j >= params.dim) break;
        const float low = sum == 0.0f ? 0.0f : rows.out[j][2 * half] * inverse;
        const float high = sum == 0.0f ? 0.0f : rows.out[j][2 * half + 1] * inverse;
        *reinterpret_cast<uint32_t*>(out + 8 * j) = ptx::pack_pair<T>(low, high);
      }
    }
  }
}

template <typename T, int kDim, bool kValues>
__global__ __launch_bounds__(kThreads, kDim <= 128 ? 3 : 2) void attention_kernel(
    const __grid_constant__ AttentionParams params, const __grid_constant__ TileGrid grid) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int positions[2][kKeys];  // of the keys of even and odd steps
  __shared__ int poisoned[kKeys];
  using Tile = SharedTile<T, kDim>;
  const Tile q_tile{reinterpret_cast<T*>(shared)};
  const Tile k_tile{reinterpret_cast<T*>(shared + Tile::kBytes)};
  const Tile v_tile{reinterpret_cast<T*>(shared + 2 * Tile::kBytes)};

  const RowTile tile = row_tile<kRows>(params, grid);
  if (tile.height <= 0) return;
  const TileKeys keys = tile_keys(params, tile);
  const HeadJob& job = tile.job;
  const HeadsView& k_view = job.from_local ? params.k_local : params.k;
  const HeadsView& v_view = job.from_local ? params.v_local : params.v;
  const T* k = head_rows<const T>(k_view, tile.batch, job.kv_head);
  const int lane = threadIdx.x % 32;
  const int first_m = tile.position + threadIdx.x / 32 * 16 + lane / 4;
  const float factor = params.scale * kLog2E;

  const auto find_positions = [&](int step) {
    if (threadIdx.x < kKeys) {
      positions[step % 2][threadIdx.x] = keys.position(step * kKeys + threadIdx.x);
    }
  };
  const auto load_keys = [&](int step) {
    k_tile.load(k, k_view.row_stride, params.dim, params.vectorized,
                [&](int row) { return positions[step % 2][row]; });
    ptx::cp_async_commit();
  };

  find_positions(0);
  q_tile.load(head_rows<const T>(params.q, tile.batch, job.head), params.q.row_stride, params.dim,
              params.vectorized,
              [&](int row) { return row < tile.height ? tile.row + row : kNoKey; });
  __syncthreads();
  load_keys(0);
  ptx::cp_async_wait<0>();
  __syncthreads();

  constexpr bool kKeepQueries = kDim <= 128;  // in registers
  uint32_t queries[kKeepQueries ? kDim / 16 : 1][4];
  if constexpr (kKeepQueries) {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) load_queries(queries[i], q_tile, i);
  }
  Rows<T, kDim> rows;
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.out[j][e] = 0.0f;
  }
  rows.maximum[0] = rows.maximum[1] = -INFINITY;
  rows.sum[0] = rows.sum[1] = 0.0f;

  const int steps = (keys.count + kKeys - 1) / kKeys;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, everyone is done with V
    if constexpr (kValues) {
      v_tile.load(head_rows<const T>(v_view, tile.batch, job.kv_head), v_view.row_stride,
                  params.dim, params.vectorized, [&](int row) { return positions[step % 2][row]; });
      ptx::cp_async_commit();
      if (threadIdx.x < kKeys) poisoned[threadIdx.x] = 0;
    }
    find_positions(step + 1);
    float scores[8][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if constexpr (kKeepQueries) {
        multiply_keys(scores, queries[i], k_tile, i);
      } else {
        load_queries(queries[0], q_tile, i);
        multiply_keys(scores, queries[0], k_tile, i);
      }
    }
    if constexpr (kValues) ptx::cp_async_wait<0>();
    __syncthreads();  // V and the next positions are there, everyone is done with K
    if (step + 1 < steps) load_keys(step + 1);

    const int* at = positions[step % 2];
    const bool masked = at[kKeys - 1] > tile.position || at[0] <= keys.last - keys.window;
    if (masked) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = at[8 * j + 2 * (lane % 4) + e % 2];
          if (!keys.sees(first_m + e / 2 * 8, n)) scores[j][e] = -INFINITY;
        }
      }
    }
    soften<T, kDim, kValues>(scores, rows, factor);
    if constexpr (kValues) {
      if (masked && __syncthreads_or(find_poisoned(v_tile, poisoned))) {
        add_poisoned(v_tile, poisoned, at, keys, first_m, scores, rows);
        __syncthreads();
        clear_poisoned(v_tile, poisoned);
        __syncthreads();
      }
      multiply_values(rows, scores, v_tile);
    }
  }
  store<T, kDim, kValues>(params, tile, rows);
}

}  // namespace mma

template <typename T, int kDim>
cudaError_t launch_attention_mma(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kTile = mma::SharedTile<T, kDim>::kBytes;
  return params.out.ptr ? launch_tiles<mma::kRows>(mma::attention_kernel<T, kDim, true>, params,
                                                   mma::kThreads, 3 * kTile, stream)
                        : launch_tiles<mma::kRows>(mma::attention_kernel<T, kDim, false>, params,
                                                   mma::kThreads, 2 * kTile, stream);
}

}  // namespace rtpurbo::cuda
