#pragma once
// The kernel of attention on sm_90: a warpgroup that copies, and one or two teams of two that
// compute, until the queue of row tiles is empty.

#include "csrc/cuda/ptx/setmaxnreg.cuh"
#include "csrc/cuda/sm90/attention_consumer.cuh"
#include "csrc/cuda/sm90/attention_producer.cuh"
#include "csrc/cuda/sm90/merge_parts.cuh"

namespace rtpurbo::cuda::sm90 {

template <typename T, int kDim, bool kValues>
__global__ __launch_bounds__(kBlockThreads<kDim>, 1) void attention_kernel(
    const __grid_constant__ AttentionParams params, const __grid_constant__ AttentionMaps maps,
    const __grid_constant__ WorkQueue queue) {
  using Memory = Shared<kDim>;
  constexpr int kTeams = Teams<kDim>::kCount;
  extern __shared__ unsigned char unaligned[];
  const uint32_t padding = -ptx::shared_address(unaligned) % alignof(Memory);
  Memory& shared = *reinterpret_cast<Memory*>(unaligned + padding);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory::kTiles; ++i) {
      shared.work_full[i].init(1);
      shared.queries_full[i].init(1);
      // Behind it all consumers are done with the work, and the producers that only read it.
      shared.queries_empty[i].init(kBlockThreads<kDim> - kWarpgroup + kTeams - 1);
    }
    for (auto& ring : shared.rings) {
      for (int i = 0; i < ring.kSize; ++i) {
        ring.full[i].init(1);
        ring.empty[i].init(kConsumerWarps);
      }
    }
    if constexpr (kTeams > 1) {
      for (auto& exchange : shared.exchange) {
        for (auto& full : exchange.full) full.init(kWarpgroup);
      }
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kWarpgroup) {
    // Without values, which are most of what a consumer holds, all keep what they have.
    if constexpr (kValues) ptx::release_registers<Teams<kDim>::kProducerRegisters>();
    const int team = kTeams == 1 ? 0 : thread / 32;
    if (thread == 32 * team && team < kTeams) {
      Producer<kDim, kValues>{
          .maps = maps, .shared = shared, .ring = shared.rings[team], .team = team, .stage = {}}
          .run(params, queue);
    }
  } else {
    if constexpr (kValues) ptx::take_registers<Teams<kDim>::kConsumerRegisters>();
    const int consumer = thread / kWarpgroup - 1;
    const int team = kTeams == 1 ? 0 : consumer / kConsumers;
    const int warp = thread / 32 - (1 + team * kConsumers) * (kWarpgroup / 32);
    Consumer<T, kDim, kValues>{.params = params,
                               .maps = maps,
                               .shared = shared,
                               .ring = shared.rings[team],
                               .factor = params.scale * kLog2E,
                               .team = team,
                               .warpgroup = consumer - team * kConsumers,
                               .row = warp * kWarpRows + thread % 32 / 4}
        .run();
  }
}

template <typename T, int kDim, bool kValues>
cudaError_t launch(const AttentionParams& params, const AttentionMaps& maps, const WorkQueue& queue,
                   int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>) + alignof(Shared<kDim>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = attention_kernel<T, kDim, kValues>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error =
          cudaMemsetAsync(params.ticket_ptr, 0, sizeof(*params.ticket_ptr), stream);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<blocks, kBlockThreads<kDim>, kBytes, stream>>>(params, maps, queue);
  if (const cudaError_t error = cudaGetLastError(); !kValues || error != cudaSuccess) return error;
  return merge_parts<T, kDim>(params, queue, stream);
}

template <typename T, int kDim>
cudaError_t launch_attention(const AttentionParams& params, const AttentionMaps& maps,
                             const WorkQueue& queue, int blocks, cudaStream_t stream) {
  return params.out.ptr ? launch<T, kDim, true>(params, maps, queue, blocks, stream)
                        : launch<T, kDim, false>(params, maps, queue, blocks, stream);
}

}  // namespace rtpurbo::cuda::sm90
