#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Scoring and top-p in one: for every query row the smallest set S_h(m) of far keys, or blocks of
/// them, whose softmax mass under the index reaches p together with the near keys'.
///
/// Row i stands at m = N - M + i. Near keys (n - start < sinks or m - n < window, n visible) are
/// attended anyway and never listed. Logits are r^-0.5 q_index . k_index + offset.
///
/// q_index    [B, R, M, r]; k_index [B, Rk, N, r]; float32, float64, bfloat16 or float16 each
/// index_map  the head of k_index that each of the R queries reads
/// near_lse   [B, R, M], log-mass of the near keys from the true logits (index form
///            `beyond_window`); without it the index logits of the near keys count (form `full`)
/// offset     [R]; start int64 [B], first real key of each sequence
/// min_tokens far keys that join by rank even when p is reached, in blocks rounded up
/// block_size 1, 16, 32 or 64: members are blocks n / block_size, weighed by their far keys
/// capacity   room for members, 0 for ceil(N / block_size); a row that needs more has count -1
/// codes      keys [0, Q) quantised, Q = 64 n: codes [B, Rk, Q, c] and ranges [B, Rk, n, 2 r] as
///            quantize_index returns them; k_index then holds keys [Q, N)
/// refine     with codes and block_size 1: k_index holds all keys, [0, N). Of a row whose smallest
///            set has c members the 2 c best are scored again from k_index; only they can be
///            members, the others keep their share of all mass. If those 2 c do not reach p, all of
///            them are members. Rows with p = 1 or a NaN or +inf logit are not refined.
/// returns    indices int32 [B, R, M, capacity], ascending, -1 padded; counts int32 [B, R, M]; mass
///            [B, R, M] float32 (float64 for float64), the recovered share. A NaN or +inf logit
///            selects all far keys and gives a NaN mass; a row that sees no key: count 0, mass 1.
/// exact      false may add members whose weights lie within 2.2 % of the last one's: the rest of
///            the threshold's histogram bin, where this has at most 32 members more than a quarter
///            of those above it; not to refined rows
/// On CUDA weights are rounded to 17 bits, so that 2^-17 may be missing to p.
std::tuple<at::Tensor, at::Tensor, at::Tensor> select(
    const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map, double p,
    int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size = 1,
    const std::optional<at::Tensor>& near_lse = std::nullopt,
    const std::optional<at::Tensor>& offset = std::nullopt,
    const std::optional<at::Tensor>& start = std::nullopt, int64_t capacity = 0, bool exact = true,
    const std::optional<at::Tensor>& codes = std::nullopt,
    const std::optional<at::Tensor>& ranges = std::nullopt, bool refine = false);

}  // namespace rtpurbo
