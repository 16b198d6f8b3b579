#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// A decode step in one call: near_lse, select and decode of one new query row a sequence.
///
/// Each retrieval head selects, by its index query, the smallest set of far keys (or blocks of
/// them) whose mass reaches p together with the near keys', and attends to both; local heads attend
/// to their near keys. Arguments are those of `select` and of `decode`.
///
/// q, k, v, retrieval_heads, window, near_window, sinks, scale, k_local, v_local, start, length
///                  as in `decode`; R >= 1 retrieval heads
/// q_index          [B, R, 1, r]; k_index [B, Rk, N, r], or what follows codes
/// index_map, p, min_tokens, block_size, offset, codes, ranges, exact  as in `select`
/// beyond_window    whether near keys count with their true logits (form `beyond_window`) or with
///                  those of the index (form `full`)
/// returns          out, lse as in `decode`; selected int64 [B, R, 1, ceil(N / 64)]: bit i of word
///                  j tells whether key 64 j + i is in a selected member; counts int32 [B, R, 1] of
///                  members; mass as in `select`
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sparse_decode(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef retrieval_heads,
    const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map, double p,
    int64_t window, int64_t near_window, int64_t sinks, int64_t min_tokens, double scale,
    int64_t block_size = 1, bool beyond_window = true,
    const std::optional<at::Tensor>& offset = std::nullopt,
    const std::optional<at::Tensor>& k_local = std::nullopt,
    const std::optional<at::Tensor>& v_local = std::nullopt,
    const std::optional<at::Tensor>& start = std::nullopt, int64_t length = -1,
    const std::optional<at::Tensor>& codes = std::nullopt,
    const std::optional<at::Tensor>& ranges = std::nullopt, bool exact = true);

}  // namespace rtpurbo
