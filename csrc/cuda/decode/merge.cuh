#pragma once
// The splits of a head, and its near and listed keys, merged by their log-sum-exp.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"

namespace rtpurbo::cuda {

constexpr int kMergeThreads = 128;

template <typename T>
__global__ __launch_bounds__(kMergeThreads) void merge_kernel(
    const __grid_constant__ DecodeParams p, Partials partials) {
  constexpr float kLn2 = 0.6931471805599453f;
  const int64_t head = blockIdx.x, batch = blockIdx.y;
  const int16_t* slots = p.head_slots[head];
  const auto place = [&](int slot, int split) {
    return (batch * p.splits + split) * p.slots_count + slots[slot];
  };
  const int slots_used = slots[1] >= 0 ? 2 : 1;
  const int parts = slots_used * p.splits;
  extern __shared__ float shares[];  // [parts]
  __shared__ float warp_values[kMergeThreads / 32];
  const auto reduced = [&](float value, auto combine) {
    for (int step = 16; step > 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_values[0];
    for (int w = 1; w < kMergeThreads / 32; ++w) value = combine(value, warp_values[w]);
    return value;
  };
  const auto part_place = [&](int i) { return place(i / p.splits, i % p.splits); };
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
    largest = fmaxf(largest, partials.stats[part_place(i)].x);
  }
  largest = reduced(largest, [](float a, float b) { return fmaxf(a, b); });
  const float base = largest == -INFINITY ? 0.0f : largest;
  float total = 0.0f;
  for (int i = threadIdx.x; i < parts; i += kMergeThreads) {
    const float2 stats = partials.stats[part_place(i)];
    shares[i] = exp2f(stats.x - base);
    total += shares[i] * stats.y;
  }
  total = reduced(total, [](float a, float b) { return a + b; });
  const float norm = total == 0.0f ? 0.0f : 1.0f / total;
  T* out = static_cast<T*>(p.out.ptr) + batch * p.out.batch_stride + head * p.out.head_stride;
  for (int64_t d = threadIdx.x; d < p.dim; d += kMergeThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) {
      sum = fmaf(shares[i], partials.sums[part_place(i) * p.dim + d], sum);
    }
    out[d] = from_float<T>(sum * norm);
  }
  if (threadIdx.x == 0) p.lse_ptr[batch * p.heads + head] = (largest + log2f(total)) * kLn2;
}

}  // namespace rtpurbo::cuda
