#pragma once
// PTX ISA, "Warp-level matrix store instruction: stmatrix" (sm_90).

#include <cstdint>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Stores four 8x8 matrices of 16-bit elements. Lane l gives the address (a multiple of 16) of row
/// l % 8 of matrix l / 8; of matrix j it gives in r[j] row l / 4, columns 2 (l % 4) and + 1.
__device__ __forceinline__ void stmatrix_x4(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace rtpurbo::cuda::ptx
