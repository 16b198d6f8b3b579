#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace rtpurbo {

/// index_project and cache_append of the same tokens: their keys and values go to rings and pages,
/// their index keys WK_h k_pre to index_pages, and their index queries WQ_h q_pre are returned. On
/// CUDA this is one launch for up to 16 tokens a sequence, and two for more.
///
/// k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start   as in cache_append
/// q_pre, k_pre  [B, Hq, M, D], [B, Hk, M, D] before RoPE, of one dtype, which need not be k's
/// w_q, w_k      [R, r, D], [Rk, r, D] of one dtype, for the heads q_heads and k_heads
/// index_pages   floating [B, Rk, capacity, r], from slot index_slot on (-1: position), written in
///               place
/// returns       q_index [B, R, M, r] of index_pages's dtype
at::Tensor cache_append_projected(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring,
                                  at::Tensor& v_ring, at::Tensor& k_pages, at::Tensor& v_pages,
                                  at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                                  const at::Tensor& q_pre, const at::Tensor& k_pre,
                                  const at::Tensor& w_q, const at::Tensor& w_k,
                                  at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                                  at::Tensor& index_pages,
                                  const std::optional<at::Tensor>& start = std::nullopt,
                                  int64_t index_slot = -1);

}  // namespace rtpurbo
