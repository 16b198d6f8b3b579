#pragma once
// What parts of a row tile found, each with its share of the keys, in scratch memory.

#include <cstdint>

#include "csrc/cuda/sm90/work_queue.h"

namespace rtpurbo::cuda::sm90 {

/// A part: rows of the output and of their log-sum-exp.
template <int kDim>
class Parts {
 public:
  static constexpr int kFloats = kTileRows * (kDim + 1);

  __host__ __device__ explicit Parts(float* scratch) : scratch_(scratch) {}

  __device__ float* out(int64_t part) const { return scratch_ + part * kFloats; }
  __device__ float* lse(int64_t part) const { return out(part) + kTileRows * kDim; }

 private:
  float* const scratch_;
};

}  // namespace rtpurbo::cuda::sm90
