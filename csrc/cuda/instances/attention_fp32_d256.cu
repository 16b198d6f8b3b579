#include "csrc/cuda/attention_simt.cuh"

namespace rtpurbo::cuda {

template cudaError_t launch_attention_simt<256>(const AttentionParams&, cudaStream_t);

}  // namespace rtpurbo::cuda
