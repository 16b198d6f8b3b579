// A block takes 16 query rows of a head over all keys. Every thread keeps the softmax of its own
// keys; they meet once, at the end.

#include <algorithm>

#include "csrc/cuda/dot_tile.cuh"
#include "csrc/cuda/retrieval_scores.h"

namespace rtpurbo::cuda {
namespace {

constexpr int kRows = DotTile::kColumns;  // keys are the tile's rows
constexpr int kKeys = DotTile::kRows;
constexpr int kSize = DotFragment::kSize;

/// Softmax sums relative to `top`: of all keys, and of those in [pre_begin, pre_end).
struct Mass {
  float top = -INFINITY;
  float sum = 0;
  float pre = 0;

  /// A NaN or +inf score makes the sums NaN.
  __device__ void raise(float score) {
    if (!(score > top)) return;
    const float decay = expf(top - score);
    sum *= decay;
    pre *= decay;
    top = score;
  }
  __device__ float weight(float score) const { return expf(score - (top == -INFINITY ? 0 : top)); }
  __device__ void add(const Mass& other) {
    raise(other.top);
    const float share = weight(other.top);
    sum += other.sum * share;
    pre += other.pre * share;
  }
};

template <typename T>
__global__ __launch_bounds__(DotTile::kThreads, 4) void retrieval_scores_kernel(
    const __grid_constant__ RetrievalScoresParams p, bool aligned) {
  __shared__ DotTile tile;
  __shared__ Mass parts[DotTile::kThreads / kSize][kRows];
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  const int64_t units = p.batch * p.query_heads * tiles;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t first_row = unit % tiles * kRows;
    const int64_t h = unit / tiles % p.query_heads;
    const int64_t b = unit / tiles / p.query_heads;
    const int64_t count = min(p.rows - first_row, static_cast<int64_t>(kRows));
    const int64_t first_m = p.keys - p.rows + first_row;  // position of the tile's first row
    const int64_t start = p.start_ptr ? max(p.start_ptr[b], int64_t{0}) : 0;
    const T* k = static_cast<const T*>(p.k.ptr) + b * p.k.batch_stride +
                 h / (p.query_heads / p.kv_heads) * p.k.head_stride;
    const Rows<T> queries{static_cast<const T*>(p.q.ptr) + b * p.q.batch_stride +
                              h * p.q.head_stride + first_row * p.q.row_stride,
                          p.q.row_stride, count};

    Mass mass[kSize];
    for (int64_t n = start; n < first_m + count; n += kKeys) {
      const Rows<T> keys{k + n * p.k.row_stride, p.k.row_stride, p.keys - n};
      const DotFragment logits = dot_tile(tile, keys, queries, p.dim, aligned);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int64_t last = first_m + DotFragment::column(j);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int64_t key = n + DotFragment::row(i);
          if (key > last || DotFragment::column(j) >= count) continue;
          const float score = logits.at[i][j] * p.scale;
          mass[j].raise(score);
          const float weight = mass[j].weight(score);
          mass[j].sum += weight;
          if (key >= p.pre_begin && key < p.pre_end) mass[j].pre += weight;
        }
      }
    }

    __syncthreads();
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      parts[DotFragment::row(0)][DotFragment::column(j)] = mass[j];
    }
    __syncthreads();
    if (threadIdx.x < count) {
      Mass total;
      for (const auto& part : parts) total.add(part[threadIdx.x]);
      float* row = p.mass_ptr + (b * p.query_heads + h) * p.rows + first_row + threadIdx.x;
      *row = total.sum == 0 ? 0 : total.pre / total.sum;
    }
  }
}

}  // namespace

cudaError_t launch_retrieval_scores(const RetrievalScoresParams& p, cudaStream_t stream) {
  const int64_t units = p.batch * p.query_heads * ((p.rows + kRows - 1) / kRows);
  if (units == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(units, INT32_MAX));
  return dispatch_element(p.type, [&](auto element) {
    using T = decltype(element);
    const bool aligned =
        aligned_for_load4(p.q, sizeof(T), p.dim) && aligned_for_load4(p.k, sizeof(T), p.dim);
    retrieval_scores_kernel<T><<<blocks, DotTile::kThreads, 0, stream>>>(p, aligned);
    return cudaGetLastError();
  });
}

}  // namespace rtpurbo::cuda
