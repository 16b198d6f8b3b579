#pragma once
#include <cstdint>

namespace rtpurbo::cuda {

/// Head dims that the attention and decode kernels are compiled for go up to this.
inline constexpr int64_t kMaxHeadDim = 256;

/// Index dims, whose queries shared memory holds.
inline constexpr int64_t kMaxIndexDim = 512;

}  // namespace rtpurbo::cuda
