#include "csrc/cuda/sm90/attention_kernel.cuh"

namespace rtpurbo::cuda::sm90 {

template cudaError_t launch_attention<__half, 256>(const AttentionParams&, const AttentionMaps&,
                                                   const WorkQueue&, int, cudaStream_t);

}  // namespace rtpurbo::cuda::sm90
