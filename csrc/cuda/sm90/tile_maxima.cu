#include <algorithm>

#include "csrc/cuda/sm90/tile_maxima.h"
#include "csrc/cuda/sm90/tile_maxima/key_map.h"
#include "csrc/cuda/sm90/tile_maxima/scorer.cuh"

namespace rtpurbo::cuda::sm90 {
namespace {

using namespace maxima;

__global__ __launch_bounds__(kThreads, 1) void tile_maxima_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w,
    const __grid_constant__ Plan plan, const __grid_constant__ CUtensorMap key_map) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<KeyRing::Shared*>(bytes);
  const Item item = item_of(plan, blockIdx.x);
  const Range stages = stages_of(p, w, plan, item);
  if (stages.end <= stages.begin) return;
  if (threadIdx.x == 0) KeyRing::init(shared);
  __syncthreads();
  const auto pair = static_cast<uint32_t>(w.first_pair) + item.pair;
  const auto heads = static_cast<uint32_t>(p.heads);
  KeyRing ring(shared, key_map, pair / heads, p.index_map.heads[pair % heads], stages);
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
  CUtensorMap map;
  // The copies leave a last block of fewer keys out; no row may see it as far.
  const bool whole_blocks = p.keys - p.window <= p.keys / tiles::kBlock * tiles::kBlock;
  return p.rank_by_max && p.tile == kRows && whole_blocks &&
         attribute(cudaDevAttrComputeCapabilityMajor, major) == cudaSuccess &&
         attribute(cudaDevAttrComputeCapabilityMinor, minor) == cudaSuccess && major == 9 &&
         minor == 0 && encode_key_map(map, p);
}

cudaError_t launch_tile_maxima(const SelectTilesParams& p, const Workspace& w,
                               cudaStream_t stream) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(tile_maxima_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(KeyRing::Shared)))) {
    return error;
  }
  CUtensorMap key_map;
  if (!encode_key_map(key_map, p)) return cudaErrorNotSupported;
  const Plan plan(w);
  if (plan.items > INT32_MAX) return cudaErrorInvalidConfiguration;
  tile_maxima_kernel<<<static_cast<unsigned>(plan.items), kThreads, sizeof(KeyRing::Shared),
                       stream>>>(p, w, plan, key_map);
  return cudaGetLastError();
}

}  // namespace rtpurbo::cuda::sm90
