#pragma once
// PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (sm_90a).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Matrix descriptor of a tile of 128-byte rows with the 128-byte swizzle, at a multiple of 1024
/// bytes: eight rows are 1024 bytes. `panel_bytes` is the distance of the next 64 columns; only
/// transposed operands use it.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, uint32_t panel_bytes) {
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  // All lanes have the same; ptxas keeps what comes from one lane in uniform registers.
  const uint32_t start = __shfl_sync(~0u, shared_address(shared) >> 4, 0);
  return start | uint64_t{panel_bytes >> 4} << 16 | kEightRows | kSwizzle128;
}

/// Orders this warp's register accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/// Waits until at most `kPending` of the latest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving accesses to registers that a wgmma has across this point.
template <typename R, int kSize>
__device__ __forceinline__ void pin(R (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if constexpr (std::is_same_v<R, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// The operands of d, which PTX wants one by one.
#define RTPURBO_D8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define RTPURBO_D32(d, i) \
  RTPURBO_D8(d, i), RTPURBO_D8(d, i + 8), RTPURBO_D8(d, i + 16), RTPURBO_D8(d, i + 24)
#define RTPURBO_D64(d, i) RTPURBO_D32(d, i), RTPURBO_D32(d, i + 32)
#define RTPURBO_D128(d, i) RTPURBO_D64(d, i), RTPURBO_D64(d, i + 64)
#define RTPURBO_NAMES32                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define RTPURBO_NAMES64                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "     \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, " \
  "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define RTPURBO_NAMES128                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "     \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, " \
  "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, " \
  "%69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "    \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "  \
  "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// `last` names the operands behind d; a string, as their numbers depend on the size of d.
#define RTPURBO_WGMMA(shape, type, registers, last, ...)                   \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type \
               " " RTPURBO_NAMES##registers last                           \
               : RTPURBO_D##registers(d, 0)                                \
               : __VA_ARGS__)
#define RTPURBO_WGMMA_TYPES(shape, registers, last, ...)        \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {             \
    RTPURBO_WGMMA(shape, "bf16", registers, last, __VA_ARGS__); \
  } else {                                                      \
    RTPURBO_WGMMA(shape, "f16", registers, last, __VA_ARGS__);  \
  }

/// d[64, kN] = a[64, 16] b[kN, 16]^T, or += when kAccumulate; both in shared memory. In d lane l of
/// warp w has, at 4 j + 2 h + e, row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + e.
template <typename T, int kN, bool kAccumulate>
__device__ __forceinline__ void wgmma_rows(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  static_assert(kN == 64 || kN == 128);
  if constexpr (kN == 64) {
    RTPURBO_WGMMA_TYPES("m64n64k16", 32, ", %32, %33, %34, 1, 1, 0, 0;\n", "l"(a), "l"(b),
                        "n"(kAccumulate));
  } else {
    RTPURBO_WGMMA_TYPES("m64n128k16", 64, ", %64, %65, %66, 1, 1, 0, 0;\n", "l"(a), "l"(b),
                        "n"(kAccumulate));
  }
}

/// The same with a in registers as in mma_m16n8k16, 16 rows a warp.
template <typename T, int kN, bool kAccumulate>
__device__ __forceinline__ void wgmma_rows(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 64 || kN == 128);
  if constexpr (kN == 64) {
    RTPURBO_WGMMA_TYPES("m64n64k16", 32, ", {%32, %33, %34, %35}, %36, %37, 1, 1, 0;\n", "r"(a[0]),
                        "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAccumulate));
  } else {
    RTPURBO_WGMMA_TYPES("m64n128k16", 64, ", {%64, %65, %66, %67}, %68, %69, 1, 1, 0;\n", "r"(a[0]),
                        "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAccumulate));
  }
}

/// d[64, kN] += a[64, 16] b[16, kN]: a in registers as in mma_m16n8k16, 16 rows a warp; b in shared
/// memory with contiguous columns.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_columns(float (&d)[kN / 2], const uint32_t (&a)[4],
                                              uint64_t b) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (kN == 64) {
    RTPURBO_WGMMA_TYPES("m64n64k16", 32, ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n", "r"(a[0]),
                        "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kN == 128) {
    RTPURBO_WGMMA_TYPES("m64n128k16", 64, ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n", "r"(a[0]),
                        "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    RTPURBO_WGMMA_TYPES("m64n256k16", 128, ", {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n",
                        "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef RTPURBO_WGMMA_TYPES
#undef RTPURBO_WGMMA
#undef RTPURBO_NAMES128
#undef RTPURBO_NAMES64
#undef RTPURBO_NAMES32
#undef RTPURBO_D128
#undef RTPURBO_D64
#undef RTPURBO_D32
#undef RTPURBO_D8

}  // namespace rtpurbo::cuda::ptx
