#include "csrc/cuda/sm90/attention_kernel.cuh"

namespace rtpurbo::cuda::sm90 {

template cudaError_t launch_attention<__nv_bfloat16, 128>(const AttentionParams&,
                                                          const AttentionMaps&, const WorkQueue&,
                                                          int, cudaStream_t);

}  // namespace rtpurbo::cuda::sm90
