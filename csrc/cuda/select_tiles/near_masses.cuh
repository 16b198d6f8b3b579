#pragma once
// Form `full` where stage 1 keeps maxima in fp16: the log-mass of each row's near keys by their
// scores, as `near_lse` gives that of true logits in form `beyond_window`.

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/select_tiles/mma_pair.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kNearWarps = 8;
constexpr int kNearRows = 16;  // of a warp

/// near [B, heads, rows]. fp16 queries and keys of 16 dimensions.
__global__ __launch_bounds__(32 * kNearWarps) void near_masses_kernel(
    const __grid_constant__ SelectTilesParams p, float* near) {
  using namespace mma;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t number = int64_t{blockIdx.x} * kNearWarps + threadIdx.x / 32;
  const int64_t runs = (p.rows + kNearRows - 1) / kNearRows;
  const int64_t pair = number / runs, first_row = (number - pair * runs) * kNearRows;
  const int64_t batch = pair / p.heads, head = pair - batch * p.heads;
  if (batch >= p.batch) return;
  const int rows = static_cast<int>(min(int64_t{kNearRows}, p.rows - first_row));
  // Of the first row; those of the others slide along.
  const auto position = static_cast<int>(p.keys - p.rows + first_row);
  const auto window_begin = static_cast<int>(position + 1 - p.window);
  const auto start =
      static_cast<int>(p.start_ptr ? min(max(p.start_ptr[batch], int64_t{0}), p.keys) : 0);
  const auto far_begin = static_cast<int>(min(start + p.sinks, p.keys));

  uint32_t query[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    if (row >= rows) continue;
    const uint2 q = load_quarter(
        head_rows<const __half>(p.q_index, batch, head) + (first_row + row) * p.q_index.row_stride,
        t);
    query[half] = q.x;
    query[half + 2] = q.y;
  }
  const __half* keys = head_rows<const __half>(p.k_index, batch, p.index_map.heads[head]);
  Log2Sum sum;  // of row g + 8 (t / 2) and every other block
  const auto add = [&](int begin, int end) {
#pragma unroll 1
    for (int key = begin; key < end; key += kStep) {
      const bool all = key >= window_begin + kNearRows - 1 && key + kStep <= min(end, position + 1);
      PairMass<false> mass;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int first = key + b * kBlock;
        const Scores scores = score(query, load_keys<true>(keys, first, end, g, t));
        if (all) {
          mass.take(b, scores, kLog2OfDot, t, [](int, int) { return true; });
        } else {
          mass.take(b, scores, kLog2OfDot, t, [&](int half, int i) {
            const int n = first + i, row = g + 8 * half;
            return n < end && n <= position + row && (n < far_begin || n >= window_begin + row);
          });
        }
      }
      sum.add(mass.finish(kLog2OfDot, t));
    }
  };
  add(start, min(far_begin, position + rows));
  add(max(far_begin, window_begin), position + rows);
  sum.add({__shfl_xor_sync(kAll, sum.top, 1), __shfl_xor_sync(kAll, sum.sum, 1)});
  const int row = g + 8 * (t / 2);
  if (t % 2 == 0 && row < rows) near[pair * p.rows + first_row + row] = sum.value() / kLog2E;
}

}  // namespace rtpurbo::cuda::tiles
