#pragma once
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor" (sm_90).

#include <cuda.h>

#include <cstdint>

#include "csrc/cuda/ptx/mbarrier.cuh"
#include "csrc/cuda/ptx/shared_address.cuh"

namespace rtpurbo::cuda::ptx {

/// Starts copying the box at those coordinates of a tensor to shared memory; zeros where it is
/// outside. All its bytes count for `full`.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap& map, int x, int row,
                                         int head, int batch, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&full.state))
      : "memory");
}

/// The same of a tensor of five dimensions.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap& map, int x0, int x1,
                                         int x2, int x3, int x4, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(shared_address(&full.state))
      : "memory");
}

/// Starts copying a box from shared memory to those coordinates of a tensor, but for what would be
/// outside. To be preceded by a fence_shared_writes of all threads that wrote the box.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int x, int row, int head,
                                          int batch, const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n" ::"l"(
          &map),
      "r"(x), "r"(row), "r"(head), "r"(batch), "r"(shared_address(shared))
      : "memory");
}

/// Lets the copy engine see what this thread wrote to shared memory.
__device__ __forceinline__ void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

/// Waits until the boxes that this thread's stores read may be written again.
__device__ __forceinline__ void wait_for_stored_boxes() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

}  // namespace rtpurbo::cuda::ptx
