#pragma once
// PTX ISA, "Miscellaneous Instructions: setmaxnreg" (sm_90a).

namespace rtpurbo::cuda::ptx {

/// Gives registers of each thread of the warpgroup back, down to `kRegisters`.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/// Takes registers for each thread of the warpgroup, up to `kRegisters`; waits until they are free.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace rtpurbo::cuda::ptx
