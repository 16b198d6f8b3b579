#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace rtpurbo {

/// Index queries and index keys from the features before RoPE (WQ_h q_pre and WK_h k_pre of the
/// paper): q_index[b, j] = q[b, q_heads[j]] w_q[j]^T and k_index[b, j] = k[b, k_heads[j]] w_k[j]^T.
///
/// q       [B, Hq, Mq, D]; k [B, Hk, Mk, D] of the same dtype (after QK-norm where there is one)
/// w_q     [R, r, D], one projection for each of the query heads q_heads; w_k [Rk, r, D]
/// dtype   of the results; w_q's when absent. Products accumulate in float32 (float64 for float64)
/// returns q_index [B, R, Mq, r], k_index [B, Rk, Mk, r]
std::tuple<at::Tensor, at::Tensor> index_project(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q, const at::Tensor& w_k,
    at::IntArrayRef q_heads, at::IntArrayRef k_heads,
    std::optional<at::ScalarType> dtype = std::nullopt);

/// Gradients of one side of index_project, y[b, j] = x[b, heads[j]] w[j]^T, given grad [B, R, M, r]
/// of y. Returns grad_x like x and grad_w like w; one that `wanted` leaves out is empty.
std::tuple<at::Tensor, at::Tensor> index_project_backward(const at::Tensor& grad,
                                                          const at::Tensor& x, const at::Tensor& w,
                                                          at::IntArrayRef heads,
                                                          std::array<bool, 2> wanted);

}  // namespace rtpurbo
