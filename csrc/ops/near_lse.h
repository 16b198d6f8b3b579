#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace rtpurbo {

/// Log-sum-exp of the true logits over the near keys, which index form `beyond_window` adds to the
/// index's own mass: log sum_n exp(scale q_m . k_n) over n visible with n - start < sinks or
/// m - n < window.
///
/// q       [B, Hq, M, D]; k [B, Hk, N, D], N >= M, row i at position N - M + i
/// q_heads query heads, any order; k_heads, of the same length, the head of k that each reads
/// start   int64 [B], first real key of each sequence
/// returns [B, len(q_heads), M] float32 (float64 for float64); a row that sees no key: -inf
at::Tensor near_lse(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef q_heads,
                    at::IntArrayRef k_heads, int64_t window, int64_t sinks, double scale,
                    const std::optional<at::Tensor>& start = std::nullopt);

}  // namespace rtpurbo
