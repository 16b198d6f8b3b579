// Few rows (decode) take one warp an output element, which is all latency. Many rows share a tile
// of the weights in shared memory.

#include <algorithm>

#include "csrc/cuda/dot_tile.cuh"
#include "csrc/cuda/index_project.h"

namespace rtpurbo::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int64_t kFewRows = 16;
constexpr int64_t kMaxGridX = INT32_MAX;
constexpr int64_t kMaxGridZ = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The side and the output of it that blockIdx.y stands for.
struct Output {
  const IndexProjectSide& side;
  int j;

  __device__ static Output of(const IndexProjectParams& p) {
    const int number = static_cast<int>(blockIdx.y);
    const int queries = p.q.heads.count;
    return number < queries ? Output{p.q, number} : Output{p.k, number - queries};
  }

  template <typename X>
  __device__ const X* x(int64_t b) const {
    return static_cast<const X*>(side.x.ptr) + b * side.x.batch_stride +
           side.heads.heads[j] * side.x.head_stride;
  }

  template <typename W>
  __device__ const W* w(const IndexProjectParams& p, int64_t i) const {
    return static_cast<const W*>(side.w_ptr) + (j * p.index_dim + i) * p.dim;
  }

  __device__ void store(const IndexProjectParams& p, int64_t b, int64_t row, int64_t i,
                        float value) const {
    const int64_t at =
        b * side.out.batch_stride + j * side.out.head_stride + row * side.out.row_stride + i;
    switch (p.out_type) {
      case ElementType::kFloat32:
        static_cast<float*>(side.out.ptr)[at] = value;
        break;
      case ElementType::kBFloat16:
        static_cast<__nv_bfloat16*>(side.out.ptr)[at] = from_float<__nv_bfloat16>(value);
        break;
      case ElementType::kFloat16:
        static_cast<__half*>(side.out.ptr)[at] = from_float<__half>(value);
        break;
    }
  }
};

template <typename X, typename W>
__global__ __launch_bounds__(32 * kWarps) void few_rows_kernel(
    const __grid_constant__ IndexProjectParams p, bool aligned) {
  const Output output = Output::of(p);
  const int lane = threadIdx.x % 32;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (element >= output.side.rows * p.index_dim) return;
  const int64_t row = element / p.index_dim;
  const int64_t i = element % p.index_dim;
  const W* w = output.w<W>(p, i);
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    const X* x = output.x<X>(b) + row * output.side.x.row_stride;
    float sum = 0;
    for (int64_t d = 4 * lane; d < p.dim; d += 4 * 32) {
      sum = dot4(load4(x, d, p.dim, aligned), load4(w, d, p.dim, aligned), sum);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) output.store(p, b, row, i, sum);
  }
}

template <typename X, typename W>
__global__ __launch_bounds__(DotTile::kThreads) void many_rows_kernel(
    const __grid_constant__ IndexProjectParams p, bool aligned) {
  __shared__ DotTile tile;
  const Output output = Output::of(p);
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
bool aligned_side(const IndexProjectSide& side, int64_t dim) {
  return side.heads.count == 0 || (aligned_for_load4(side.x, sizeof(X), dim) &&
                                   reinterpret_cast<uintptr_t>(side.w_ptr) % (4 * sizeof(W)) == 0);
}

template <typename X, typename W>
cudaError_t launch(const IndexProjectParams& p, cudaStream_t stream) {
  const bool aligned = aligned_side<X, W>(p.q, p.dim) && aligned_side<X, W>(p.k, p.dim);
  const int64_t rows = std::max(p.q.rows, p.k.rows);
  const bool few = rows <= kFewRows;
  const int64_t blocks =
      few ? ceil_div(rows * p.index_dim, kWarps)
          : ceil_div(rows, DotTile::kRows) * ceil_div(p.index_dim, DotTile::kColumns);
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMaxGridX)),
                  static_cast<unsigned>(p.q.heads.count + p.k.heads.count),
                  static_cast<unsigned>(std::min(p.batch, kMaxGridZ)));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (few) {
    few_rows_kernel<X, W><<<grid, 32 * kWarps, 0, stream>>>(p, aligned);
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
