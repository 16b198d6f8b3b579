#pragma once
// Few rows (decode) take one warp an output element, which is all latency.

#include <algorithm>

#include "csrc/cuda/dot_tile.cuh"
#include "csrc/cuda/index_project.h"

namespace rtpurbo::cuda {

inline constexpr int64_t kFewRows = 16;
inline constexpr int kFewRowsWarps = 8;

__host__ __device__ inline int outputs(const IndexProjectParams& p) {
  return p.q.heads.count + p.k.heads.count;
}

/// `blocks` for each of the units, and as many sequences as fit; the others follow in turns.
inline dim3 unit_grid(int64_t blocks, int64_t units, int64_t batch) {
  constexpr int64_t kMaxX = INT32_MAX, kMaxZ = 65535;
  return {static_cast<unsigned>(std::min(blocks, kMaxX)), static_cast<unsigned>(units),
          static_cast<unsigned>(std::min(batch, kMaxZ))};
}

/// The side and the output of it that blockIdx.y stands for.
struct IndexOutput {
  const IndexProjectSide& side;
  int j;

  __device__ static IndexOutput of(const IndexProjectParams& p) {
    const int number = static_cast<int>(blockIdx.y);
    const int queries = p.q.heads.count;
    return number < queries ? IndexOutput{p.q, number} : IndexOutput{p.k, number - queries};
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

/// Elements of the output blockIdx.y, a block of kFewRowsWarps at blockIdx.x.
template <typename X, typename W>
__device__ __forceinline__ void project_few_rows(const IndexProjectParams& p, bool aligned) {
  const IndexOutput output = IndexOutput::of(p);
  const int lane = threadIdx.x % 32;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kFewRowsWarps + threadIdx.x / 32;
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

/// Whether load4 may use vectors on rows and weights of both sides.
template <typename X, typename W>
bool projects_aligned(const IndexProjectParams& p) {
  const auto aligned = [&](const IndexProjectSide& side) {
    return side.heads.count == 0 ||
           (aligned_for_load4(side.x, sizeof(X), p.dim) &&
            reinterpret_cast<uintptr_t>(side.w_ptr) % (4 * sizeof(W)) == 0);
  };
  return aligned(p.q) && aligned(p.k);
}

}  // namespace rtpurbo::cuda
