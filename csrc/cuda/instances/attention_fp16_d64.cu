#include "csrc/cuda/attention_mma.cuh"

namespace rtpurbo::cuda {

template cudaError_t launch_attention_mma<__half, 64>(const AttentionParams&, cudaStream_t);

}  // namespace rtpurbo::cuda
