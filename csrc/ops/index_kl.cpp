#include "csrc/ops/index_kl.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/cpu/index_kl.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/index.h"

namespace rtpurbo {
namespace {

constexpr const char* kOp = "index_kl";

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

void check_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_index,
                     const at::Tensor& k_index, const at::Tensor& rows,
                     at::IntArrayRef retrieval_heads, at::IntArrayRef index_map) {
  TORCH_CHECK_VALUE(k.dim() == 4, "rtpurbo::index_kl: k must have shape [B, Hk, N, D], got ",
                    k.sizes());
  check_qkv(kOp, q, k, k, "k", "k");
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "rtpurbo::index_kl: q must have a multiple of the ", k.size(1),
                    " KV heads, got Hq = ", q.size(1));
  check_heads(kOp, "retrieval_heads", retrieval_heads, q.size(1));
  TORCH_CHECK_VALUE(index_map.size() == retrieval_heads.size(),
                    "rtpurbo::index_kl: index_map must name the index key of each of the ",
                    retrieval_heads.size(), " retrieval_heads, got ", index_map.size());
  check_index(kOp, q_index, k_index, index_map);
  check_device(kOp, "q_index", q_index, "q", q);
  check_tensor(kOp, "q_index", q_index, "[B, R, Mr, r]",
               {q.size(0), q_index.size(1), q.size(2), q_index.size(3)});
  check_tensor(kOp, "k_index", k_index, "[B, Rk, N, r]",
               {q.size(0), k_index.size(1), k.size(2), k_index.size(3)});
  check_dtype(kOp, "rows", rows, at::kLong);
  check_device(kOp, "rows", rows, "q", q);
  check_tensor(kOp, "rows", rows, "[B, Mr]", {q.size(0), q.size(2)});
}

Result index_kl_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_index,
                    const at::Tensor& k_index, const at::Tensor& rows,
                    at::IntArrayRef retrieval_heads, at::IntArrayRef index_map,
                    const MaybeTensor& offset, int64_t window, int64_t sinks, double scale,
                    bool beyond_window, const MaybeTensor& start) {
  check_arguments(q, k, q_index, k_index, rows, retrieval_heads, index_map);
  check_mask(kOp, window, sinks, scale);
  check_start(kOp, start, "q", q);
  const at::Tensor positions = rows.contiguous();
  const auto* first = positions.const_data_ptr<int64_t>();
  const auto* highest = std::max_element(first, first + positions.numel());
  TORCH_CHECK_VALUE(positions.numel() == 0 || *highest < k.size(2),
                    "rtpurbo::index_kl: rows must be positions below N = ", k.size(2), ", got ",
                    *highest);
  const at::ScalarType accum =
      q.scalar_type() == at::kDouble ? at::kDouble : accumulation_type(q_index, k_index);
  const at::Tensor offsets = per_head(kOp, "offset", offset, q_index, accum);

  const int64_t heads = q_index.size(1);
  const int64_t keys = k.size(2);
  const auto options = q.options().dtype(accum);
  const at::Tensor kl = at::zeros({heads}, options);
  const at::Tensor kl_rows = at::zeros({q.size(0), heads, q.size(2)}, options);
  const at::Tensor grad_q = at::zeros({q.size(0), heads, q.size(2), q_index.size(3)}, options);
  const at::Tensor grad_k = at::zeros({q.size(0), heads, keys, q_index.size(3)}, options);
  const at::Tensor grad_offset = at::zeros({heads}, options);
  at::Tensor start_kept;
  cpu::index_kl_kernel({.dtype = q.scalar_type(),
                        .q_index_dtype = q_index.scalar_type(),
                        .k_index_dtype = k_index.scalar_type(),
                        .accum = accum,
                        .q = heads_view(q),
                        .k = heads_view(k),
                        .q_index = heads_view(q_index),
                        .k_index = heads_view(k_index),
                        .rows_ptr = first,
                        .retrieval_heads = retrieval_heads.data(),
                        .index_map = index_map.data(),
                        .offset_ptr = offsets.defined() ? offsets.const_data_ptr() : nullptr,
                        .start_ptr = start_ptr(start, start_kept),
                        .kl_ptr = kl.mutable_data_ptr(),
                        .kl_rows_ptr = kl_rows.mutable_data_ptr(),
                        .grad_q_ptr = grad_q.mutable_data_ptr(),
                        .grad_k_ptr = grad_k.mutable_data_ptr(),
                        .grad_offset_ptr = grad_offset.mutable_data_ptr(),
                        .batch = q.size(0),
                        .heads = heads,
                        .group = q.size(1) / k.size(1),
                        .rows = q.size(2),
                        .keys = keys,
                        .dim = q.size(3),
                        .index_dim = q_index.size(3),
                        .window = std::min(window, keys),
                        .sinks = std::min(sinks, keys),
                        .scale = scale,
                        .beyond_window = beyond_window});
  return {kl, kl_rows, grad_q.to(q_index.scalar_type()), grad_k.to(k_index.scalar_type()),
          offset ? grad_offset.to(offset->scalar_type()) : grad_offset};
}

}  // namespace

Result index_kl(const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_index,
                const at::Tensor& k_index, const at::Tensor& rows, at::IntArrayRef retrieval_heads,
                at::IntArrayRef index_map, const MaybeTensor& offset, int64_t window, int64_t sinks,
                double scale, bool beyond_window, const MaybeTensor& start) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::index_kl", "")
                             .typed<decltype(index_kl)>();
  return op.call(q, k, q_index, k_index, rows, retrieval_heads, index_map, offset, window, sinks,
                 scale, beyond_window, start);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "index_kl(Tensor q, Tensor k, Tensor q_index, Tensor k_index, Tensor rows,"
      " int[] retrieval_heads, int[] index_map, Tensor? offset, int window, int sinks,"
      " float scale, bool beyond_window, Tensor? start=None) -> (Tensor kl, Tensor kl_rows,"
      " Tensor grad_q_index, Tensor grad_k_index, Tensor grad_offset)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("index_kl", &index_kl_cpu); }

}  // namespace rtpurbo
