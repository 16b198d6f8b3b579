#pragma once
// One split of one set on the CUDA cores: any element type, head dim and stride. A warp takes every
// kSimtWarps-th key, lanes take the dimensions.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/limits.h"
#include "csrc/cuda/ptx/grid_dependency.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

constexpr int kSimtWarps = 8;

template <typename T>
__global__ __launch_bounds__(32 * kSimtWarps) void decode_simt_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  constexpr int kLaneDims = kMaxHeadDim / 32;
  __shared__ float shared_max[kSimtWarps], shared_sum[kSimtWarps];
  __shared__ float shared_out[kSimtWarps][kMaxHeadDim];
  ptx::let_next_kernel_begin();
  const DecodeSet& set = p.sets[blockIdx.y];
  const int split = blockIdx.x;
  const int64_t batch = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int dim = static_cast<int>(p.dim);
  const SetKeys<int64_t, true> keys(p, set, batch);
  const Range<int64_t> range = split_range(keys.total(), split, p.splits, kSimtWarps);
  const HeadsView& k_view = set.from_local ? p.k_local : p.k;
  const HeadsView& v_view = set.from_local ? p.v_local : p.v;
  const T* k = head_rows<const T>(k_view, batch, set.kv_head);
  const T* v = head_rows<const T>(v_view, batch, set.kv_head);
  const float scale = p.scale * kLog2E;

  for (int h = 0; h < set.heads_count; ++h) {
    const int64_t head = p.slot_heads[set.first_slot + h];
    const T* q = head_rows<const T>(p.q, batch, head);
    float query[kLaneDims], sums[kLaneDims];
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = i * 32 + lane;
      query[i] = d < dim ? to_float(q[d]) : 0.0f;
      sums[i] = 0.0f;
    }
    float top = -INFINITY, total = 0.0f;
    const int64_t hidden = h >= set.heads_count - set.near_heads ? keys.far() : 0;
    for (int64_t j = range.begin + warp; j < range.end; j += kSimtWarps) {
      if (j < hidden) continue;
      const int64_t n = keys.row(j);
      if (n < 0) continue;
      float logit = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        const int d = i * 32 + lane;
        if (d < dim) logit = fmaf(query[i], to_float(k[n * k_view.row_stride + d]), logit);
      }
      for (int step = 16; step > 0; step /= 2) logit += __shfl_xor_sync(0xffffffffu, logit, step);
      logit *= scale;
      const float new_top = fmaxf(top, logit);
      const float base = softmax_shift(new_top);
      const float shrink = exp2f(top - base), weight = exp2f(logit - base);
      top = new_top;
      total = total * shrink + weight;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        const int d = i * 32 + lane;
        if (d < dim)
          sums[i] = fmaf(weight, to_float(v[n * v_view.row_stride + d]), sums[i] * shrink);
      }
    }
    if (lane == 0) {
      shared_max[warp] = top;
      shared_sum[warp] = total;
    }
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) shared_out[warp][i * 32 + lane] = sums[i];
    __syncthreads();
    float largest = -INFINITY;
    for (int w = 0; w < kSimtWarps; ++w) largest = fmaxf(largest, shared_max[w]);
    const float base = softmax_shift(largest);
    const int64_t place = (batch * p.splits + split) * p.slots_count + set.first_slot + h;
    float all = 0.0f;
    for (int w = 0; w < kSimtWarps; ++w) all += shared_sum[w] * exp2f(shared_max[w] - base);
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < kSimtWarps; ++w) sum += shared_out[w][d] * exp2f(shared_max[w] - base);
      if (p.has_whole_heads()) {
        head_rows<T>(p.out, batch, head)[d] = from_float<T>(all == 0.0f ? 0.0f : sum / all);
      } else {
        partials.sums[place * p.dim + d] = sum;
      }
    }
    if (threadIdx.x == 0) {
      if (p.has_whole_heads()) {
        p.lse_ptr[batch * p.heads + head] = lse_of_octaves(largest, all);
      } else {
        partials.stats[place] = make_float2(largest, all);
      }
    }
    __syncthreads();
  }
}

}  // namespace rtpurbo::cuda
