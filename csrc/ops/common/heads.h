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

HeadsView heads_view(const at::Tensor& tensor);

/// The int64 data of a contiguous copy of `tensor`, which is kept alive in `keep`; null without it.
const int64_t* start_ptr(const std::optional<at::Tensor>& tensor, at::Tensor& keep);

/// Checks q [B, Hq, M, D], D % 8 == 0, and that k and v are alike [B, heads, N, D].
void check_qkv(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const char* k_name, const char* v_name);

/// Checks N >= M where k holds a head.
void check_rows(const char* op, const at::Tensor& q, const at::Tensor& k, const char* k_name);

/// Checks heads, q, k, v, start and the local pair against each other; returns how many KV heads
/// there are in both together.
int64_t check_heads_and_keys(const char* op, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, at::IntArrayRef retrieval_heads,
                             const std::optional<at::Tensor>& start,
                             const std::optional<at::Tensor>& k_local,
                             const std::optional<at::Tensor>& v_local);

/// Checks tile, block_size and the block lists [B, R, T, C], [B, R, T] of attention.
void check_blocks(const char* op, const at::Tensor& q, int64_t lists,
                  const std::optional<at::Tensor>& block_indices,
                  const std::optional<at::Tensor>& block_counts, int64_t tile, int64_t block_size);

/// Checks window >= 1, sinks >= 0 and a positive finite scale.
void check_mask(const char* op, int64_t window, int64_t sinks, double scale);

}  // namespace rtpurbo
