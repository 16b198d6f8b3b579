#pragma once
// From the arguments of the attention operators to the kernels' parameters.

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "csrc/cpu/attention.h"

namespace rtpurbo {

/// Which query heads share keys and mask, KV head by KV head: the local ones together, the
/// retrieval ones together, or one by one when each has its own block lists. With `split_cache`
/// local KV heads and full KV heads live in two tensors, each in ascending order.
std::vector<cpu::HeadSet> head_sets(at::IntArrayRef retrieval_heads, int64_t num_heads,
                                    int64_t num_kv_heads, bool listed, bool split_cache);

/// How many KV heads hold a retrieval head.
int64_t count_full_heads(at::IntArrayRef retrieval_heads, int64_t group);

cpu::HeadsView heads_view(const at::Tensor& tensor);

/// The int64 data of a contiguous copy of `tensor`, which is kept alive in `keep`; null without it.
const int64_t* start_ptr(const std::optional<at::Tensor>& tensor, at::Tensor& keep);

/// Checks q [B, Hq, M, D], D % 8 == 0, and that k and v are [B, heads, N, D] alike; N >= M.
void check_qkv(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const char* k_name, const char* v_name, int64_t heads);

/// Checks window >= 1, sinks >= 0 and a positive finite scale.
void check_mask(const char* op, int64_t window, int64_t sinks, double scale);

}  // namespace rtpurbo
