#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace rtpurbo {

/// How much each query head attends from a needle's repetition back to the needle,
///   R_h = mean over t in post of sum over j in pre of A_h(t, j)   (R_h of the paper),
/// where post are the rows of q, at the last P positions, and pre the keys [pre_begin, pre_end).
///
/// q       [B, Hq, P, D], D a multiple of 8; k [B, Hk, N, D], Hq = G Hk, N >= P
/// start   int64 [B], first real key of each sequence (left padding)
/// returns [B, Hq] float32 (float64 for float64), in [0, 1]; a row that sees no key counts 0
at::Tensor retrieval_scores(const at::Tensor& q, const at::Tensor& k, int64_t pre_begin,
                            int64_t pre_end, double scale,
                            const std::optional<at::Tensor>& start = std::nullopt);

}  // namespace rtpurbo
