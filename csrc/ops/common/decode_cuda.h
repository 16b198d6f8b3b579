#pragma once
#ifdef RTPURBO_WITH_CUDA
// From the checked arguments of decode and sparse_decode to the parameters of the CUDA kernels.

#include "csrc/cpu/decode.h"
#include "csrc/cuda/decode.h"

namespace rtpurbo::cuda {

/// Checks what the kernels are limited to, and groups the heads into sets.
DecodeParams decode_params(const char* op, const cpu::DecodeParams& in);

}  // namespace rtpurbo::cuda
#endif
