#pragma once
// Form `full` where stage 1 keeps maxima in fp16: the log-mass of each row's near keys by their
// scores, as `near_lse` gives that of true logits in form `beyond_window`.

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select_tiles/problem.cuh"
#include "csrc/cuda/select_tiles/quad.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kNearWarps = 8;
constexpr int kNearRows = 4;  // of a warp, whose near keys are nearly the same

/// near [B, heads, rows]. fp16 queries and keys of 16 dimensions.
__global__ __launch_bounds__(32 * kNearWarps) void near_masses_kernel(
    const __grid_constant__ SelectTilesParams p, float* near) {
  const int lane = threadIdx.x % 32;
  const int64_t number = int64_t{blockIdx.x} * kNearWarps + threadIdx.x / 32;
  const int64_t runs = (p.rows + kNearRows - 1) / kNearRows;
  const int64_t pair = number / runs, first_row = (number - pair * runs) * kNearRows;
  const int64_t batch = pair / p.heads, head = pair - batch * p.heads;
  if (batch >= p.batch) return;
  const int rows = static_cast<int>(min(int64_t{kNearRows}, p.rows - first_row));
  // Row 0's; those of the next ones slide along.
  const auto position = static_cast<int>(p.keys - p.rows + first_row);
  const auto window_begin = static_cast<int>(position + 1 - p.window);
  const auto start =
      static_cast<int>(p.start_ptr ? min(max(p.start_ptr[batch], int64_t{0}), p.keys) : 0);
  const auto far_begin = static_cast<int>(min(start + p.sinks, p.keys));

  float query[kNearRows][kDim];
#pragma unroll
  for (int i = 0; i < kNearRows; ++i) {
    const __half* q = head_rows<const __half>(p.q_index, batch, head) +
                      (first_row + min(i, rows - 1)) * p.q_index.row_stride;
#pragma unroll
    for (int d = 0; d < kDim; ++d) query[i][d] = __half2float(q[d]) * kLog2OfDot;
  }
  Log2Sum sums[kNearRows];
  const __half* keys = head_rows<const __half>(p.k_index, batch, p.index_map.heads[head]);
  const auto add = [&](int begin, int end, int row_begin) {
    for (int n = begin + lane; n < end; n += 32) {
      const auto* key = reinterpret_cast<const uint4*>(keys + int64_t{n} * kDim);
      const uint4 halves[2] = {__ldg(key), __ldg(key + 1)};
      float dots[kNearRows] = {};
#pragma unroll
      for (int d = 0; d < kDim; ++d) {
        const float k = __half2float(reinterpret_cast<const __half*>(halves)[d]);
#pragma unroll
        for (int i = 0; i < kNearRows; ++i) dots[i] = fmaf(query[i][d], k, dots[i]);
      }
#pragma unroll
      for (int i = 0; i < kNearRows; ++i) {
        if (n >= row_begin + i && n <= position + i) sums[i].add_rarely_larger(dots[i]);
      }
    }
  };
  add(start, min(far_begin, position + rows), start - kNearRows);
  add(max(far_begin, window_begin), position + rows, window_begin);
#pragma unroll
  for (int i = 0; i < kNearRows; ++i) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      sums[i].add(
          {__shfl_xor_sync(kAll, sums[i].top, step), __shfl_xor_sync(kAll, sums[i].sum, step)});
    }
    if (lane == 0 && i < rows) near[pair * p.rows + first_row + i] = sums[i].value() / kLog2E;
  }
}

}  // namespace rtpurbo::cuda::tiles
