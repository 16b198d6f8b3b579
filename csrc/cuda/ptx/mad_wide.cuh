#pragma once
// PTX ISA, "Integer Arithmetic Instructions: mad".

#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// The address n times `stride` bytes behind `base`, by one instruction: of a product in C++ the
/// compiler may forget that its factors have 32 bits.
template <typename T>
__device__ __forceinline__ T* offset_by(T* base, int n, int stride) {
  uint64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;"
      : "=l"(address)
      : "r"(n), "r"(stride), "l"(reinterpret_cast<uint64_t>(base)));
  return reinterpret_cast<T*>(address);
}

}  // namespace rtpurbo::cuda::ptx
