#pragma once
// The blocks that share a problem.

#include <cstdint>
#include <cuda/atomic>

#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

/// All blocks of the grid are resident (a cooperative launch), so that a block may wait for others.
class Team {
 public:
  __device__ explicit Team(const SelectWorkspace& w)
      : number(blockIdx.x / w.team_size),
        rank(blockIdx.x % w.team_size),
        size(w.team_size),
        works(number < w.teams),
        arrivals_(w.arrivals + number) {}

  /// To be called, with a barrier of the grid behind it, before the first sync.
  __device__ void reset() const {
    if (works && rank == 0 && threadIdx.x == 0) *arrivals_ = 0;
  }

  /// What any thread of the team wrote before is visible, past L1, to all of them after.
  __device__ void sync() {
    expected_ += size;
    __syncthreads();
    if (threadIdx.x == 0 && size > 1) {
      const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> arrivals(*arrivals_);
      arrivals.fetch_add(1, ::cuda::memory_order_acq_rel);
      while (arrivals.load(::cuda::memory_order_acquire) < expected_) {
      }
    }
    __syncthreads();
  }

  const int number, rank, size;
  const bool works;  // blocks that are left over belong to no team

 private:
  uint32_t* const arrivals_;
  uint32_t expected_ = 0;
};

}  // namespace rtpurbo::cuda
