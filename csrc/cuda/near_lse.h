#pragma once
#include "csrc/cuda/attention.h"

namespace rtpurbo::cuda {

/// Parts in which launch_near_lse reads the near keys of a row.
int64_t near_lse_splits(const AttentionParams& params);

/// Log-sum-exp over the near keys for few query rows: blocks share out the keys of each row, so
/// that a single row uses the whole device. partials_ptr has room for two floats a split, row and
/// job.
cudaError_t launch_near_lse(const AttentionParams& params, float* partials_ptr,
                            cudaStream_t stream);

}  // namespace rtpurbo::cuda
