#pragma once
// What the operators that make index queries and index keys check and hand to their kernels.

#include <ATen/core/Tensor.h>

#include <array>
#ifdef RTPURBO_WITH_CUDA
#include "csrc/cuda/index_project.h"
#endif

namespace rtpurbo {

/// y[b, j] = x[b, heads[j]] w[j]^T, and what its arguments are called.
struct Projection {
  const char *x_name, *w_name, *heads_name;
  const at::Tensor &x, &w;
  at::IntArrayRef heads;
};

void check_projection(const char* op, const Projection& side);

/// Checks that of the queries, that of the keys, and that they go together.
void check_projections(const char* op, const Projection& q, const Projection& k);

/// y [B, heads, M, r], not filled.
at::Tensor empty_projection(const Projection& side, at::ScalarType dtype);

/// Fills y, `out` or a view.
void project_on_cpu(const Projection& side, const at::Tensor& out);

#ifdef RTPURBO_WITH_CUDA
/// Kernel parameters; `weights_kept` keeps what they point into. Refuses float64; `out_name` is
/// what the outputs' dtype comes from.
cuda::IndexProjectParams projection_params(const char* op, const Projection& q, const Projection& k,
                                           const char* out_name, const at::Tensor& q_out,
                                           const at::Tensor& k_out,
                                           std::array<at::Tensor, 2>& weights_kept);
#endif

}  // namespace rtpurbo
