#pragma once
// PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier".

namespace rtpurbo::cuda::ptx {

/// One of barriers 1 to 15 of the block (0 is that of __syncthreads): a phase ends when `threads`
/// have arrived, in whole warps.
struct NamedBarrier {
  int number;
  int threads;

  /// Arrives and waits.
  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
  }

  __device__ __forceinline__ void arrive() const {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
  }

  /// Arrives and waits; whether one of the threads says so.
  __device__ __forceinline__ bool any(bool value) const {
    int result;
    asm volatile(
        "{\n"
        ".reg .pred mine, any;\n"
        "setp.ne.b32 mine, %3, 0;\n"
        "barrier.cta.red.or.pred any, %1, %2, mine;\n"
        "selp.b32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(result)
        : "r"(number), "r"(threads), "r"(static_cast<int>(value))
        : "memory");
    return result;
  }
};

}  // namespace rtpurbo::cuda::ptx
