#pragma once
// Products of up to 128 rows with up to 16 others along the last dimension, in float32.

#include <cstdint>

#include "csrc/cuda/element.cuh"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// Rows in global memory, `stride` elements apart.
template <typename T>
struct Rows {
  const T* ptr;
  int64_t stride;
  int64_t count;
};

/// Elements [d, d + 4) of a row, 0 from `dim` on. `aligned`: rows lie on multiples of 4 elements,
/// and dim is one.
template <typename T>
__device__ __forceinline__ float4 load4(const T* row, int64_t d, int64_t dim, bool aligned) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  if (aligned && d < dim) {
    const Four four = *reinterpret_cast<const Four*>(row + d);
    return {to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3])};
  }
  const auto at = [&](int64_t i) { return i < dim ? to_float(row[i]) : 0.0f; };
  return {at(d), at(d + 1), at(d + 2), at(d + 3)};
}

__device__ __forceinline__ float dot4(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

/// Shared memory of a block of kThreads; the pitch keeps float4 accesses free of bank conflicts.
struct DotTile {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 128;
  static constexpr int kColumns = 16;
  static constexpr int kDepth = 32;
  static constexpr int kPitch = kDepth + 4;
  float rows[kRows][kPitch];
  float columns[kColumns][kPitch];
};

/// What a thread holds of the products: 4 rows x 4 columns, of those that row() and column() name.
struct DotFragment {
  static constexpr int kSize = 4;
  float at[kSize][kSize];

  __device__ static int row(int m) { return static_cast<int>(threadIdx.x) / 4 + m * 32; }
  __device__ static int column(int n) { return static_cast<int>(threadIdx.x) % 4 + n * 4; }
};

/// All threads of the block take part; rows past a's and b's count give 0.
template <typename A, typename B>
__device__ __forceinline__ DotFragment dot_tile(DotTile& tile, const Rows<A>& a, const Rows<B>& b,
                                                int64_t dim, bool aligned) {
  constexpr int kVectors = DotTile::kDepth / 4;
  constexpr int kStep = DotTile::kThreads / kVectors;
  static_assert(kStep == DotTile::kColumns);
  const int first = static_cast<int>(threadIdx.x) / kVectors;
  const int place = static_cast<int>(threadIdx.x) % kVectors * 4;
  DotFragment sum{};
  for (int64_t d = 0; d < dim; d += DotTile::kDepth) {
    const auto load = [&](const auto& rows, int row) {
      return row < rows.count ? load4(rows.ptr + row * rows.stride, d + place, dim, aligned)
                              : float4{};
    };
    __syncthreads();
#pragma unroll
    for (int row = first; row < DotTile::kRows; row += kStep) {
      *reinterpret_cast<float4*>(&tile.rows[row][place]) = load(a, row);
    }
    *reinterpret_cast<float4*>(&tile.columns[first][place]) = load(b, first);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < DotTile::kDepth; c += 4) {
      float4 x[DotFragment::kSize], y[DotFragment::kSize];
#pragma unroll
      for (int i = 0; i < DotFragment::kSize; ++i) {
        x[i] = *reinterpret_cast<const float4*>(&tile.rows[DotFragment::row(i)][c]);
        y[i] = *reinterpret_cast<const float4*>(&tile.columns[DotFragment::column(i)][c]);
      }
#pragma unroll
      for (int m = 0; m < DotFragment::kSize; ++m) {
#pragma unroll
        for (int n = 0; n < DotFragment::kSize; ++n) {
          sum.at[m][n] = dot4(x[m], y[n], sum.at[m][n]);
        }
      }
    }
  }
  return sum;
}

/// Whether load4 may use vectors on a tensor of `element_size` bytes an element.
inline bool aligned_for_load4(const HeadsView& view, int64_t element_size, int64_t dim) {
  const int64_t strides = view.batch_stride | view.head_stride | view.row_stride | dim;
  return reinterpret_cast<uintptr_t>(view.ptr) % (4 * element_size) == 0 && strides % 4 == 0;
}

}  // namespace rtpurbo::cuda
