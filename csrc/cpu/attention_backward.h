#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

struct AttentionBackwardParams {
  AttentionParams forward;  // as in the forward call; out and lse hold its results
  HeadsView grad_out;
  HeadsView grad_q;
  HeadsView grad_k, grad_v;
  void* delta_ptr;  // [B, Hq, M] like lse: workspace
};

RTPURBO_DECLARE_CPU_KERNEL(attention_backward_kernel, AttentionBackwardParams)

}  // namespace rtpurbo::cpu
