#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Gradients of `attention` (without k_local) with respect to q, k and v, in O(N) extra memory:
/// dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q,
/// where P = exp(scale Q K^T - lse) on the keys seen and 0 elsewhere.
///
/// grad_out  [B, Hq, M, D] of q's dtype; out, lse: what attention returned; the rest: its arguments
/// returns   grad_q, grad_k, grad_v, shaped and typed like q, k, v, stored as [B, length, heads, D]
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, at::IntArrayRef retrieval_heads, int64_t window,
    int64_t sinks, double scale, const std::optional<at::Tensor>& start,
    const std::optional<at::Tensor>& block_indices, const std::optional<at::Tensor>& block_counts,
    int64_t tile, int64_t block_size);

}  // namespace rtpurbo
