#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Stage 1: KL(a_full(m) || a_index(m)) of given query rows, and its gradients, in O(N) memory.
///
/// a_full is the softmax of scale q . k over the visible keys. a_index is that of the index logits
/// r^-0.5 q_index . k_index + offset; with beyond_window the near keys (n - start < sinks or
/// m - n < window) keep their true logits. By an index logit the KL's gradient is a_index - a_full.
///
/// q               [B, Hq, Mr, D]; k [B, Hk, N, D], D a multiple of 8
/// q_index         [B, R, Mr, r]; k_index [B, Rk, N, r]; any floating dtypes
/// rows            int64 [B, Mr], positions m < N of the rows; one with m < start is ignored
/// retrieval_heads the R ascending query heads; index_map the head of k_index that each reads
/// offset          [R] or absent; start int64 [B], first real key of each sequence
/// returns         kl [R], mean over the rows not ignored; kl_rows [B, R, Mr]; the gradients of
///                 kl[j] by q_index [B, R, Mr, r], by the keys that head j reads [B, R, N, r], and
///                 by offset [R]. kl and kl_rows float32 (float64 for float64).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> index_kl(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_index, const at::Tensor& k_index,
    const at::Tensor& rows, at::IntArrayRef retrieval_heads, at::IntArrayRef index_map,
    const std::optional<at::Tensor>& offset, int64_t window, int64_t sinks, double scale,
    bool beyond_window, const std::optional<at::Tensor>& start = std::nullopt);

}  // namespace rtpurbo
