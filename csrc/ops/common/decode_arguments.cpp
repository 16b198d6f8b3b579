#include "csrc/ops/common/decode_arguments.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>

#include <algorithm>

#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"

namespace rtpurbo {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

void check_lists(const char* op, const at::Tensor& q, int64_t lists, const MaybeTensor& indices,
                 const MaybeTensor& counts, int64_t block_size) {
  check_pair(op, "indices", indices, "counts", counts);
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::", op, ": block_size must be >= 1, got ",
                    block_size);
  if (!indices) return;
  check_tensor(op, "indices", *indices, "[B, R, 1, C]", {q.size(0), lists, 1, kAnySize});
  check_tensor(op, "counts", *counts, "[B, R, 1]", {q.size(0), lists, 1});
  check_dtype(op, "indices", *indices, at::kInt);
  check_dtype(op, "counts", *counts, at::kInt);
  check_device(op, "indices", *indices, "q", q);
  check_device(op, "counts", *counts, "q", q);
}

/// Returns N.
int64_t check_length(const char* op, const at::Tensor& q, const at::Tensor& k, int64_t length) {
  TORCH_CHECK_VALUE(q.size(2) == 1, "rtpurbo::", op, ": q must have one row, got M = ", q.size(2),
                    "; use attention for more");
  if (k.size(1) == 0) {
    TORCH_CHECK_VALUE(length >= 1, "rtpurbo::", op,
                      ": length must be the number of keys so far when no KV head "
                      "is stored whole, got ",
                      length);
    return length;
  }
  TORCH_CHECK_VALUE(length == -1 || length == k.size(2), "rtpurbo::", op,
                    ": length must be -1 or N = ", k.size(2), ", got ", length);
  return k.size(2);
}

}  // namespace

DecodeArguments::DecodeArguments(const char* op, bool listed, const at::Tensor& q,
                                 const at::Tensor& k, const at::Tensor& v,
                                 at::IntArrayRef retrieval_heads, int64_t window,
                                 int64_t near_window, int64_t sinks, double scale,
                                 const MaybeTensor& indices, const MaybeTensor& counts,
                                 int64_t block_size, const MaybeTensor& k_local,
                                 const MaybeTensor& v_local, const MaybeTensor& start,
                                 int64_t length) {
  const int64_t kv_heads =
      check_heads_and_keys(op, q, k, v, retrieval_heads, start, k_local, v_local);
  check_mask(op, window, sinks, scale);
  TORCH_CHECK_VALUE(near_window >= 1, "rtpurbo::", op, ": near_window must be >= 1, got ",
                    near_window);
  const int64_t keys = check_length(op, q, k, length);
  const int64_t lists = static_cast<int64_t>(retrieval_heads.size());
  check_lists(op, q, lists, indices, counts, block_size);
  if (k_local) {
    TORCH_CHECK_VALUE(k_local->size(1) == 0 || k_local->size(2) == sinks + window, "rtpurbo::", op,
                      ": k_local must have sinks + window = ", sinks + window, " slots, got ",
                      k_local->size(2));
  }
  out_ = at::empty({q.size(0), 1, q.size(1), q.size(3)}, q.options()).transpose(1, 2);
  lse_ = at::empty({q.size(0), q.size(1), 1}, q.options().dtype(at::toOpMathType(q.scalar_type())));
  sets_ = head_sets(retrieval_heads, q.size(1), kv_heads, listed, k_local.has_value());
  if (indices) indices_ = indices->contiguous();
  if (counts) counts_ = counts->contiguous();
  params_ = {
      .dtype = q.scalar_type(),
      .q = heads_view(q),
      .k = heads_view(k),
      .v = heads_view(v),
      .k_local = k_local ? heads_view(*k_local) : HeadsView{},
      .v_local = v_local ? heads_view(*v_local) : HeadsView{},
      .out = heads_view(out_),
      .lse_ptr = lse_.mutable_data_ptr(),
      .start_ptr = start_ptr(start, start_),
      .indices_ptr = indices ? indices_.const_data_ptr<int32_t>() : nullptr,
      .counts_ptr = counts ? counts_.const_data_ptr<int32_t>() : nullptr,
      .batch = q.size(0),
      .heads = q.size(1),
      .length = keys,
      .slots = k_local ? std::min(k_local->size(2), keys) : 0,
      .dim = q.size(3),
      .lists = lists,
      .capacity = indices ? indices->size(3) : 0,
      .block_size = block_size,
      .window = std::min(window, keys),
      .near_window = std::min(near_window, keys),
      .sinks = std::min(sinks, keys),
      .scale = scale,
      .head_sets = &sets_,
  };
}

}  // namespace rtpurbo
