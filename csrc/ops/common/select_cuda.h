#pragma once
#ifdef RTPURBO_WITH_CUDA
// From the checked arguments of select, sparse_decode and top_p to the CUDA kernels.

#include <ATen/core/Tensor.h>

#include "csrc/cpu/index_params.h"
#include "csrc/cuda/select.h"

namespace rtpurbo::cuda {

/// Checks what the kernels are limited to. Results, capacity and the choice itself are left open.
SelectParams select_params(const char* op, const cpu::IndexParams& in);

/// Runs `select` on the device and the current stream of `on`, with a workspace of its own.
void run_select(const char* op, const SelectParams& params, const at::Tensor& on);

}  // namespace rtpurbo::cuda
#endif
