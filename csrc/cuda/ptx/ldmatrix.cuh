#pragma once
// PTX ISA, "Warp-level matrix load instruction: ldmatrix" (sm_75).

#include <cstdint>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address (a multiple of 16) of row
/// l % 8 of matrix l / 8; of matrix j it gets in r[j] row l / 4, columns 2 (l % 4) and + 1.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

/// The same with each matrix transposed: in r[j] rows 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

}  // namespace rtpurbo::cuda::ptx
