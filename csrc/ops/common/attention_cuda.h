#pragma once
// From the parameters of the CPU attention kernels to those of the CUDA kernels.

#include <ATen/core/Tensor.h>

#include <functional>

#include "csrc/cpu/attention.h"
#include "csrc/cuda/attention.h"

namespace rtpurbo::cuda {

using AttentionLaunch = std::function<cudaError_t(const AttentionParams&, cudaStream_t)>;

/// Calls launch on q's device and its current stream with all heads of `params`, as many at a time
/// as a table holds. Refuses what the CUDA kernels do not take.
void for_head_tables(const char* op, const at::Tensor& q, const cpu::AttentionParams& params,
                     const AttentionLaunch& launch);

}  // namespace rtpurbo::cuda
