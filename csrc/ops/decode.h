#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Attention of one new query row a sequence, at position m = N - 1, in parallel over splits of the
/// keys whose results are merged by their log-sum-exp.
///
/// Local heads see the near keys, n - start < sinks or m - n < window. Retrieval heads see those
/// with near_window and the far keys of the listed members, or without lists all visible keys.
///
/// q               [B, Hq, 1, D], D a multiple of 8; float32, float64, bfloat16 or float16
/// k, v            [B, Hk, N, D]; with k_local only the KV heads that hold a retrieval head
/// indices         int32 [B, R, 1, C]: members n / block_size; counts int32 [B, R, 1], -1: all keys
///                 (an entry adds its far keys: outside [0, N), in padding or near it adds none)
/// k_local, v_local [B, L, sinks + window, D]: the rings of the other KV heads, of which the first
///                 min(N - start, slots) rows are valid and all seen
/// start           int64 [B], first real key of each sequence
/// length          N where k has no head to tell it; -1 otherwise
/// returns         out [B, Hq, 1, D] with memory [B, 1, Hq, D]; lse [B, Hq, 1] float32 (float64 for
///                 float64). A row that sees no key: 0, -inf.
std::tuple<at::Tensor, at::Tensor> decode(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef retrieval_heads,
    int64_t window, int64_t near_window, int64_t sinks, double scale,
    const std::optional<at::Tensor>& indices = std::nullopt,
    const std::optional<at::Tensor>& counts = std::nullopt, int64_t block_size = 1,
    const std::optional<at::Tensor>& k_local = std::nullopt,
    const std::optional<at::Tensor>& v_local = std::nullopt,
    const std::optional<at::Tensor>& start = std::nullopt, int64_t length = -1);

}  // namespace rtpurbo
