#pragma once
// PTX ISA, "Data Movement and Conversion Instructions: createpolicy" (sm_80).

#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// For copies of what is read once: it leaves the L2 cache first, so that code stays there.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace rtpurbo::cuda::ptx
