#pragma once
// PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (sm_90a), with
// accumulators of 16 bits and keys in rows of 32 bytes.

#include <cstdint>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Matrix descriptor of rows of 32 bytes with the 32-byte swizzle, at a multiple of 256 bytes: the
/// halves of rows 4 to 7 of every eight are exchanged.
__device__ __forceinline__ uint64_t descriptor_of_32_byte_rows(const void* shared) {
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  constexpr uint64_t kEightRows = uint64_t{256 >> 4} << 32;
  constexpr uint64_t kSwizzle32 = uint64_t{3} << 62;
  return (shared_address(shared) >> 4) | kUnused | kEightRows | kSwizzle32;
}

#define RTPURBO_D8(d, i)                                                                      \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])

/// d[64, 128] = a[64, 16] b[128, 16]^T in fp16: a in registers as in mma_m16n8k16, 16 rows a warp;
/// b in shared memory. In d lane l of warp w has, at 2 j + h, of row 16 w + l / 4 + 8 h the columns
/// 8 j + 2 (l % 4) and the next.
__device__ __forceinline__ void wgmma_m64n128k16(uint32_t (&d)[32], const uint32_t (&a)[4],
                                                 uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f16.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 0, 1, 1, 0;\n"
      : RTPURBO_D8(d, 0), RTPURBO_D8(d, 8), RTPURBO_D8(d, 16), RTPURBO_D8(d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef RTPURBO_D8

}  // namespace rtpurbo::cuda::ptx
