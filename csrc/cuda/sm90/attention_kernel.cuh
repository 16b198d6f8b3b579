#pragma once
// The kernel of attention on sm_90: a warpgroup that copies, two that compute, until the queue of
// row tiles is empty.

#include "csrc/cuda/ptx/setmaxnreg.cuh"
#include "csrc/cuda/sm90/attention_consumer.cuh"
#include "csrc/cuda/sm90/attention_producer.cuh"

namespace rtpurbo::cuda::sm90 {

template <typename T, int kDim, bool kValues>
__global__ __launch_bounds__(kBlockThreads, 1) void attention_kernel(
    const __grid_constant__ AttentionParams params, const __grid_constant__ AttentionMaps maps,
    const __grid_constant__ WorkQueue queue) {
  using Memory = Shared<kDim>;
  extern __shared__ unsigned char unaligned[];
  const uint32_t padding = -ptx::shared_address(unaligned) % alignof(Memory);
  Memory& shared = *reinterpret_cast<Memory*>(unaligned + padding);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory::kTiles; ++i) {
      shared.queries_full[i].init(1);
      shared.queries_empty[i].init(kConsumers * kWarpgroup);
    }
    for (int i = 0; i < Memory::kStages; ++i) {
      shared.stage_full[i].init(1);
      shared.stage_empty[i].init(kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::release_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      Producer<kDim, kValues>{.maps = maps, .shared = shared, .stage = {}}.run(params, queue);
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    const int warp = threadIdx.x / 32 - kWarpgroup / 32;
    Consumer<T, kDim, kValues> consumer{.params = params,
                                        .shared = shared,
                                        .factor = params.scale * kLog2E,
                                        .warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1,
                                        .row = warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4};
    consumer.run();
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
  kernel<<<blocks, kBlockThreads, kBytes, stream>>>(params, maps, queue);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t launch_attention(const AttentionParams& params, const AttentionMaps& maps,
                             const WorkQueue& queue, int blocks, cudaStream_t stream) {
  return params.out.ptr ? launch<T, kDim, true>(params, maps, queue, blocks, stream)
                        : launch<T, kDim, false>(params, maps, queue, blocks, stream);
}

}  // namespace rtpurbo::cuda::sm90
