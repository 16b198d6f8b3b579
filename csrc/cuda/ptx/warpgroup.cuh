#pragma once
// PTX ISA, "Miscellaneous Instructions: setmaxnreg" (sm_90a) and "bar{.cta}", for warpgroups.

#include <cstdint>

namespace rtpurbo::cuda::ptx {

/// Gives registers of each thread of the warpgroup back.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/// Takes registers for each thread of the warpgroup; waits until they are free.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/// Barriers 1 to 15 of the block, 0 being that of __syncthreads: `threads` of them arrive in all,
/// of which those that sync wait.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

/// Syncs `threads` threads; whether one of them says so.
__device__ __forceinline__ bool barrier_or(int barrier, int threads, bool value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "barrier.cta.red.or.pred any, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return any;
}

}  // namespace rtpurbo::cuda::ptx
