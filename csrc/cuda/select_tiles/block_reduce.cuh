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
  struct Shared {
    ShareCount parts[2][32];
  };

  __device__ explicit BlockReduce(Shared& shared) : shared_(shared) {}

  /// The threads' sum, in every thread.
  __device__ ShareCount sum(ShareCount own) {
    return exchange(warp_sum(own), [](ShareCount all) { return warp_sum(all); });
  }

  /// The largest, in every thread; none is below 0.
  __device__ float largest(float own) {
    const auto all = exchange({warp_max(own), 0}, [](ShareCount part) {
      return ShareCount{warp_max(part.share), 0};
    });
    return all.share;
  }

  /// Of the threads before this one, how many hold true; and of all in `total`.
  __device__ int rank(bool own, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned votes = __ballot_sync(kAll, own);
    const int in_warp = __popc(votes & ((1u << lane) - 1));
    ShareCount(&parts)[32] = next();
    if (lane == 0) parts[warp].count = __popc(votes);
    __syncthreads();
    const int count = lane < kWarps ? parts[lane].count : 0;
    total = __reduce_add_sync(kAll, count);
    return in_warp + __reduce_add_sync(kAll, lane < warp ? count : 0);
  }

 private:
  /// Two sets of parts in turns: one barrier keeps a use apart from the next but one.
  __device__ ShareCount (&next())[32] {
    turn_ ^= 1;
    return shared_.parts[turn_];
  }

  template <typename Combine>
  __device__ ShareCount exchange(ShareCount of_warp, const Combine& combine) {
    ShareCount(&parts)[32] = next();
    const int lane = threadIdx.x % 32;
    if (lane == 0) parts[threadIdx.x / 32] = of_warp;
    __syncthreads();
    return combine(lane < kWarps ? parts[lane] : ShareCount{});
  }

  static __device__ ShareCount warp_sum(ShareCount own) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) own.share += __shfl_xor_sync(kAll, own.share, step);
    return {own.share, __reduce_add_sync(kAll, own.count)};
  }

  static __device__ float warp_max(float own) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) own = fmaxf(own, __shfl_xor_sync(kAll, own, step));
    return own;
  }

  Shared& shared_;
  int turn_ = 0;
};

}  // namespace rtpurbo::cuda::tiles
