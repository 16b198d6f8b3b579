#include <algorithm>

#include "csrc/cuda/sm90/tile_maxima.h"
#include "csrc/cuda/sm90/tile_maxima/scorer.cuh"

namespace rtpurbo::cuda::sm90 {
namespace {

using namespace maxima;

__global__ __launch_bounds__(kThreads,
                             1) void tile_maxima_kernel(const __grid_constant__ SelectTilesParams p,
                                                        const __grid_constant__ Workspace w,
                                                        const __grid_constant__ Plan plan) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<KeyRing::Shared*>(bytes);
  const Item item = item_of(plan, blockIdx.x);
  const Range stages = stages_of(p, w, plan, item);
  if (stages.end <= stages.begin) return;
  if (threadIdx.x == 0) KeyRing::init(shared);
  __syncthreads();
  const int64_t pair = w.first_pair + item.pair;
  const int64_t first_key = static_cast<int64_t>(stages.begin) * kStageKeys;
  const __half* keys =
      head_rows<const __half>(p.k_index, pair / p.heads, p.index_map.heads[pair % p.heads]);
  KeyRing ring(shared, keys + first_key * p.k_index.row_stride, p.k_index.row_stride,
               p.keys - first_key, stages.end - stages.begin);
  const Group group = group_of(p, w, plan, item, threadIdx.x / 128);
  Scorer scorer(p, w, group);
  scorer.run(ring, stages);
  scorer.store_sums(item.chunk);
}

cudaError_t attribute(cudaDeviceAttr which, int& value) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&value, which, device);
}

}  // namespace

bool takes_tile_maxima(const SelectTilesParams& p) {
  int major, minor;
  return p.rank_by_max && p.near_lse_ptr && p.tile == kRows &&
         attribute(cudaDevAttrComputeCapabilityMajor, major) == cudaSuccess &&
         attribute(cudaDevAttrComputeCapabilityMinor, minor) == cudaSuccess && major == 9 &&
         minor == 0;
}

cudaError_t launch_tile_maxima(const SelectTilesParams& p, const Workspace& w,
                               cudaStream_t stream) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(tile_maxima_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(KeyRing::Shared)))) {
    return error;
  }
  const Plan plan(w);
  if (plan.items > INT32_MAX) return cudaErrorInvalidConfiguration;
  tile_maxima_kernel<<<static_cast<unsigned>(plan.items), kThreads, sizeof(KeyRing::Shared),
                       stream>>>(p, w, plan);
  return cudaGetLastError();
}

}  // namespace rtpurbo::cuda::sm90
