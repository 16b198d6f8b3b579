// Many rows share a tile of the weights in shared memory; for few rows see index_project.cuh.

#include <algorithm>

#include "csrc/cuda/index_project.cuh"
#include "csrc/cuda/integers.h"

namespace rtpurbo::cuda {
namespace {

template <typename X, typename W>
__global__ __launch_bounds__(32 * kFewRowsWarps) void few_rows_kernel(
    const __grid_constant__ IndexProjectParams p, bool aligned) {
  project_few_rows<X, W>(p, aligned);
}

template <typename X, typename W>
__global__ __launch_bounds__(DotTile::kThreads) void many_rows_kernel(
    const __grid_constant__ IndexProjectParams p, bool aligned) {
  __shared__ DotTile tile;
  const IndexOutput output = IndexOutput::of(p);
  const IndexProjectSide& side = output.side;
  const int64_t columns = (p.index_dim + DotTile::kColumns - 1) / DotTile::kColumns;
  const int64_t tiles = (side.rows + DotTile::kRows - 1) / DotTile::kRows * columns;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      const int64_t row = t / columns * DotTile::kRows;
      const int64_t i = t % columns * DotTile::kColumns;
      const Rows<X> x{output.x<X>(b) + row * side.x.row_stride, side.x.row_stride, side.rows - row};
      const Rows<W> w{output.w<W>(p, i), p.dim, p.index_dim - i};
      const DotFragment sum = dot_tile(tile, x, w, p.dim, aligned);
#pragma unroll
      for (int m = 0; m < DotFragment::kSize; ++m) {
#pragma unroll
        for (int n = 0; n < DotFragment::kSize; ++n) {
          if (DotFragment::row(m) < x.count && DotFragment::column(n) < w.count) {
            output.store(p, b, row + DotFragment::row(m), i + DotFragment::column(n), sum.at[m][n]);
          }
        }
      }
    }
  }
}

template <typename X, typename W>
cudaError_t launch(const IndexProjectParams& p, cudaStream_t stream) {
  const bool aligned = projects_aligned<X, W>(p);
  const int64_t rows = std::max(p.q.rows, p.k.rows);
  const bool few = rows <= kFewRows;
  const int64_t blocks =
      few ? divide_up(rows * p.index_dim, kFewRowsWarps)
          : divide_up(rows, DotTile::kRows) * divide_up(p.index_dim, DotTile::kColumns);
  const dim3 grid = unit_grid(blocks, outputs(p), p.batch);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (few) {
    few_rows_kernel<X, W><<<grid, 32 * kFewRowsWarps, 0, stream>>>(p, aligned);
  } else {
    many_rows_kernel<X, W><<<grid, DotTile::kThreads, 0, stream>>>(p, aligned);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_index_project(const IndexProjectParams& params, cudaStream_t stream) {
  return dispatch_element(params.x_type, [&](auto x) {
    return dispatch_element(
        params.w_type, [&](auto w) { return launch<decltype(x), decltype(w)>(params, stream); });
  });
}

}  // namespace rtpurbo::cuda
