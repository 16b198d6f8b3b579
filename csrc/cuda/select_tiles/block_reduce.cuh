#pragma once
// Sums over a thread block in a fixed order.

#include <cuda_runtime.h>

namespace rtpurbo::cuda::tiles {

struct ShareCount {
  float share = 0.0f;
  int count = 0;
};

/// Reduces and scans over kThreads threads; every thread calls each of them.
template <int kThreads>
class BlockReduce {
  static constexpr int kWarps = kThreads / 32;
  static constexpr unsigned kAll = 0xffffffffu;
  static_assert(kWarps <= 32);

 public:
  static constexpr int kMost = 3;  // sums at a time

  struct Shared {
    ShareCount parts[2][kMost][32];
  };

  __device__ explicit BlockReduce(Shared& shared) : shared_(shared) {}

  /// Replaces each by the threads' sum.
  template <int kCount>
  __device__ void sum(ShareCount (&own)[kCount]) {
    static_assert(kCount <= kMost);
    auto& parts = next();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ShareCount total{lanes_sum<32>(own[i].share), __reduce_add_sync(kAll, own[i].count)};
      if (lane == 0) parts[i][warp] = total;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ShareCount part = parts[i][lane % kWarps];
      own[i] = {lanes_sum<kWarps>(part.share),
                __reduce_add_sync(kAll, lane < kWarps ? part.count : 0)};
    }
  }

  __device__ ShareCount sum(ShareCount own) {
    ShareCount one[1] = {own};
    sum(one);
    return one[0];
  }

  /// Of the threads before this one, how many hold true; and of all in `total`.
  __device__ int rank(bool own, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned votes = __ballot_sync(kAll, own);
    const int in_warp = __popc(votes & ((1u << lane) - 1));
    auto& parts = next()[0];
    if (lane == 0) parts[warp].count = __popc(votes);
    __syncthreads();
    const int count = lane < kWarps ? parts[lane].count : 0;
    total = __reduce_add_sync(kAll, count);
    return in_warp + __reduce_add_sync(kAll, lane < warp ? count : 0);
  }

 private:
  /// Two sets of parts in turns: one barrier keeps a use apart from the next but one.
  __device__ ShareCount (&next())[kMost][32] {
    turn_ ^= 1;
    return shared_.parts[turn_];
  }

  /// Over groups of kLanes lanes, in each of them.
  template <int kLanes>
  static __device__ float lanes_sum(float own) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) own += __shfl_xor_sync(kAll, own, step);
    return own;
  }

  Shared& shared_;
  int turn_ = 0;
};

}  // namespace rtpurbo::cuda::tiles
