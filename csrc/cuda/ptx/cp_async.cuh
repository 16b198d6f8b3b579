#pragma once
// PTX ISA, "Non-bulk copy": cp.async, cp.async.commit_group, cp.async.wait_group (sm_80).

#include <cstdint>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Starts copying 16 bytes to shared memory past L1; both addresses must be multiples of 16.
/// Without `valid` it reads nothing and writes zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile(
      "{\n"
      ".reg .pred ignores;\n"
      "setp.eq.b32 ignores, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignores;\n"
      "}\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(static_cast<int>(valid))
      : "memory");
}

/// The same with a cache policy for what is read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid,
                                            uint64_t policy) {
  asm volatile(
      "{\n"
      ".reg .pred ignores;\n"
      "setp.eq.b32 ignores, %2, 0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, ignores, %3;\n"
      "}\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(static_cast<int>(valid)), "l"(policy)
      : "memory");
}

/// Closes a group of the copies that this thread started since the last one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/// Waits until at most `kPending` of this thread's latest groups are unfinished. Other threads'
/// copies are seen only behind a barrier after their own wait.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace rtpurbo::cuda::ptx
