#pragma once
// PTX ISA, "Data Movement and Conversion Instructions: prefetch".

#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// Begins to bring what lies at an address of global memory into the L2 cache.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace rtpurbo::cuda::ptx
