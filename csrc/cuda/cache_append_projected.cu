// Few rows are one grid: blocks of the outputs project, the others copy rows, a warp each.

#include "csrc/cuda/cache_append_projected.h"
#include "csrc/cuda/cache_rows.cuh"
#include "csrc/cuda/index_project.cuh"
#include "csrc/cuda/integers.h"

namespace rtpurbo::cuda {
namespace {

constexpr size_t kMaxParameters = 4096;  // bytes of a kernel's, before CUDA 12.1 and sm_70

using Params = CacheAppendProjectedParams;
static_assert(sizeof(Params) + 2 * sizeof(bool) <= kMaxParameters);

/// `aligned`: load4 may use vectors. `wide`: rows are copied 16 bytes at a time.
template <typename X, typename W>
__global__ __launch_bounds__(32 *
                             kFewRowsWarps) void few_rows_kernel(const __grid_constant__ Params p,
                                                                 bool aligned, bool wide) {
  const int unit = static_cast<int>(blockIdx.y) - outputs(p.index);
  if (unit < 0) return project_few_rows<X, W>(p.index, aligned);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFewRowsWarps + threadIdx.x / 32;
  if (row >= p.rows.rows) return;
  for (int64_t b = blockIdx.z; b < p.rows.batch; b += gridDim.z) {
    append_unit(
        p.rows, b, unit, [&](auto&& fn) { fn(row); },
        [&](char* to, const char* from, int64_t bytes) {
          if (wide) {
            copy_row<uint4>(to, from, bytes, threadIdx.x % 32, 32);
          } else {
            copy_row<uint8_t>(to, from, bytes, threadIdx.x % 32, 32);
          }
        });
  }
}

template <typename X, typename W>
cudaError_t launch_few_rows(const Params& p, cudaStream_t stream) {
  // A warp an element, of which every row has one at least: enough to copy rows, too.
  const int64_t warps = p.rows.rows * p.index.index_dim;
  const dim3 grid = unit_grid(divide_up(warps, kFewRowsWarps),
                              outputs(p.index) + append_units(p.rows), p.rows.batch);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  few_rows_kernel<X, W><<<grid, 32 * kFewRowsWarps, 0, stream>>>(
      p, projects_aligned<X, W>(p.index), append_vector_bytes(p.rows) == sizeof(uint4));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_cache_append_projected(const Params& p, cudaStream_t stream) {
  if (p.rows.rows > kFewRows) {
    if (const cudaError_t error = launch_index_project(p.index, stream)) return error;
    return launch_cache_append(p.rows, stream);
  }
  return dispatch_element(p.index.x_type, [&](auto x) {
    return dispatch_element(p.index.w_type, [&](auto w) {
      return launch_few_rows<decltype(x), decltype(w)>(p, stream);
    });
  });
}

}  // namespace rtpurbo::cuda
