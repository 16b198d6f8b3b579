#pragma once
#ifdef RTPURBO_WITH_CUDA
// From the checked arguments of select and sparse_decode to the parameters of the CUDA kernels.

#include "csrc/cpu/index_params.h"
#include "csrc/cuda/select.h"

namespace rtpurbo::cuda {

/// Checks what the kernels are limited to. Results, capacity and the choice itself are left open.
SelectParams select_params(const char* op, const cpu::IndexParams& in);

}  // namespace rtpurbo::cuda
#endif
