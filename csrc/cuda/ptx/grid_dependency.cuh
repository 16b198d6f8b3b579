#pragma once
// PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol" (sm_90).

namespace rtpurbo::cuda::ptx {

/// The kernel behind this one may begin as soon as every block has come here.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

/// Waits for the end of the kernel ahead, whose results are then visible.
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace rtpurbo::cuda::ptx
