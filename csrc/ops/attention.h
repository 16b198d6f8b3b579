#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Headwise attention of prefill and training: local heads and retrieval heads in one call.
///
/// Query row i stands at position m = N - M + i and sees keys start <= n <= m. Local heads see of
/// those the near keys, n - start < sinks or m - n < window; retrieval heads see all, or with block
/// lists those in the blocks of their tile. out = softmax(scale q k^T) v over the keys seen.
///
/// q               [B, Hq, M, D], D a multiple of 8; float32, float64, bfloat16 or float16
/// k, v            [B, Hk, N, D], Hq = G Hk, N >= M; with k_local only the KV heads that hold a
///                 retrieval head
/// retrieval_heads ascending query heads
/// start           int64 [B], first real key of each sequence (left padding)
/// k_local, v_local [B, L, Nl, D]: the other KV heads, whose keys are sinks and latest keys in
///                 order; their rows are the last M of the Nl positions, start_local int64 [B]
/// block_indices   int32 [B, R, T, C], key blocks n / block_size of each tile of `tile` rows,
///                 ascending; block_counts int32 [B, R, T], -1: the tile sees all visible keys
/// returns         out [B, Hq, M, D] with memory [B, M, Hq, D]; lse [B, Hq, M] float32 (float64 for
///                 float64), the log-sum-exp of the scaled logits. A row that sees no key: 0, -inf.
std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef retrieval_heads,
    int64_t window, int64_t sinks, double scale,
    const std::optional<at::Tensor>& start = std::nullopt,
    const std::optional<at::Tensor>& k_local = std::nullopt,
    const std::optional<at::Tensor>& v_local = std::nullopt,
    const std::optional<at::Tensor>& start_local = std::nullopt,
    const std::optional<at::Tensor>& block_indices = std::nullopt,
    const std::optional<at::Tensor>& block_counts = std::nullopt, int64_t tile = 128,
    int64_t block_size = 64);

}  // namespace rtpurbo
