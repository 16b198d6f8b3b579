#pragma once
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier" (sm_90).

#include <cstdint>

#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// A barrier in shared memory: a phase ends once `arrivals` threads arrived and all expected bytes
/// came.
struct Mbarrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&state)),
                 "r"(arrivals)
                 : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&state))
                 : "memory");
  }

  /// Arrives, and adds `bytes` to what the phase waits for.
  __device__ __forceinline__ void arrive_expect(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&state)),
        "r"(bytes)
        : "memory");
  }

  /// Waits for the end of the phase of that parity: 0 for the first phase. The phase before the
  /// first counts as ended, with parity 1.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

/// Makes initialised barriers visible to the asynchronous copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

}  // namespace rtpurbo::cuda::ptx
