#pragma once
// Attention by the asynchronous tensor cores and copy engine of sm_90.

#include <cuda_runtime_api.h>

#include "csrc/cuda/attention.h"

namespace rtpurbo::cuda::sm90 {

/// Whether this path takes the parameters: 16-bit types, aligned rows, blocks of 64 keys for tiles
/// of 128 rows where there are lists, and the current device.
bool takes_attention(const AttentionParams& params);

/// The same as attention_parts, of parameters that this path takes.
int64_t attention_parts(const AttentionParams& params);

/// The same as launch_attention. cudaErrorNotSupported, with nothing launched, when the driver
/// cannot describe the tensors.
cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda::sm90
