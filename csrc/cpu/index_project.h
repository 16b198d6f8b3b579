#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

/// out[b, j] = x[b, heads[j]] w[j]^T.
struct IndexProjectParams {
  c10::ScalarType x_dtype, w_dtype, out_dtype;
  HeadsView x, out;      // [B, H, rows, dim], [B, outputs, rows, index_dim]
  const void* w_ptr;     // [outputs, index_dim, dim] contiguous
  const int64_t* heads;  // [outputs]
  int64_t batch, outputs, rows, dim, index_dim;
};

/// grad_x[b, h] = sum over heads[j] = h of grad[b, j] w[j], and grad_w[j] = sum over b of
/// grad[b, j]^T x[b, heads[j]]; each is left out when its pointer is null.
struct IndexProjectBackwardParams {
  c10::ScalarType grad_dtype, x_dtype, w_dtype;
  HeadsView grad, x;
  const void* w_ptr;
  const int64_t* heads;
  void* grad_x_ptr;  // [B, x_heads, rows, dim] of x's dtype
  void* grad_w_ptr;  // [outputs, index_dim, dim] of w's dtype
  int64_t batch, x_heads, outputs, rows, dim, index_dim;
};

RTPURBO_DECLARE_CPU_KERNEL(index_project_kernel, IndexProjectParams)
RTPURBO_DECLARE_CPU_KERNEL(index_project_backward_kernel, IndexProjectBackwardParams)

}  // namespace rtpurbo::cpu
