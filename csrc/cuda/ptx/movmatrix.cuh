#pragma once
// PTX ISA, "Warp-level matrix transpose instruction: movmatrix" (sm_75).

#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// Transposes an 8x8 matrix of 16-bit elements; lane l holds row l / 4, columns 2 (l % 4) and + 1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(pair));
  return result;
}

}  // namespace rtpurbo::cuda::ptx
