#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// The smallest set of each row whose softmax mass reaches p (S_h(m) of the paper, for any scores).
///
/// scores      [rows, N] float32, float64, bfloat16 or float16 logits; -inf marks a non-candidate
/// p           in (0, 1]; 1 selects every candidate
/// min_members candidates that join by rank even when p is reached
/// forced_lse  [rows] float32 (float64 for float64 scores): log-mass of members outside the row
/// exact       the set of a stable descending sort; on CUDA it takes the sort. false may add
///             members whose weights lie within 2.2 % of the last one's, as in `select`; on CUDA
///             it rounds weights to 17 bits: where none are added, 2^-17 may be missing to p
/// returns     indices int32 [rows, N], ascending, -1 padded; counts int32 [rows];
///             mass [rows]: the recovered share. A NaN or +inf score selects every candidate and
///             gives a NaN mass; a row without any mass gives count 0 and mass 1.
std::tuple<at::Tensor, at::Tensor, at::Tensor> top_p(
    const at::Tensor& scores, double p, int64_t min_members = 0,
    const std::optional<at::Tensor>& forced_lse = std::nullopt, bool exact = true);

}  // namespace rtpurbo
