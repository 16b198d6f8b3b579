#pragma once
#include <cuda_runtime_api.h>

namespace rtpurbo::cuda {

/// What a kernel whose blocks wait for each other may use of the current device.
struct Residency {
  int blocks;        // resident at once
  int shared_bytes;  // of dynamic shared memory for each of them
};

/// With `blocks_of_sm` blocks of `threads` threads on a multiprocessor, or fewer where these cannot
/// have `least_shared` bytes each. Raises the kernel's limit of dynamic shared memory; remembers
/// what it found. cudaErrorCooperativeLaunchTooLarge: not even one block fits.
cudaError_t find_residency(const void* kernel, int threads, int blocks_of_sm, int least_shared,
                           Residency& found);

}  // namespace rtpurbo::cuda
