#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "csrc/cuda/residency.h"

namespace rtpurbo::cuda {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, by the driver, in every block

cudaError_t measure(const void* kernel, int device, int threads, int blocks_of_sm, int least_shared,
                    Residency& found) {
  int sms = 0, of_sm = 0, of_block = 0;
  for (const auto& [value, attribute] :
       {std::pair{&sms, cudaDevAttrMultiProcessorCount},
        std::pair{&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        std::pair{&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin}}) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return error;
  }
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  const int fixed = static_cast<int>(attributes.sharedSizeBytes);
  for (int wanted = blocks_of_sm; wanted > 0; --wanted) {
    const int room = std::min(of_sm / wanted - kReservedBytes, of_block) - fixed;
    if (room < least_shared) continue;
    found.shared_bytes = room / 128 * 128;
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_bytes)) {
      return error;
    }
    int resident = 0;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernel, threads, found.shared_bytes)) {
      return error;
    }
    found.blocks = std::min(resident, wanted) * sms;
    if (resident >= wanted) return cudaSuccess;
  }
  return cudaErrorCooperativeLaunchTooLarge;
}

}  // namespace

cudaError_t find_residency(const void* kernel, int threads, int blocks_of_sm, int least_shared,
                           Residency& found) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, Residency> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  const auto [at, is_new] = known.try_emplace({device, kernel});
  if (is_new) {
    const cudaError_t error =
        measure(kernel, device, threads, blocks_of_sm, least_shared, at->second);
    if (error != cudaSuccess) {
      at->second.blocks = 0;
      if (error != cudaErrorCooperativeLaunchTooLarge) known.erase(at);
      return error;
    }
  }
  found = at->second;
  return found.blocks > 0 ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

}  // namespace rtpurbo::cuda
