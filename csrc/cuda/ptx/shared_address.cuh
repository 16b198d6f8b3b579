#pragma once
#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// The 32-bit address that PTX instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace rtpurbo::cuda::ptx
