#include "csrc/ops/attention_backward.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/attention_backward.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"

namespace rtpurbo {
namespace {

constexpr const char* kOp = "attention_backward";

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

void check_results(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& out,
                   const at::Tensor& lse) {
  for (const auto& [name, tensor] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}}) {
    check_tensor(kOp, name, *tensor, "[B, Hq, M, D]", {q.size(0), q.size(1), q.size(2), q.size(3)});
    check_dtype(kOp, name, *tensor, q.scalar_type());
    check_device(kOp, name, *tensor, "q", q);
  }
  check_tensor(kOp, "lse", lse, "[B, Hq, M]", {q.size(0), q.size(1), q.size(2)});
  check_dtype(kOp, "lse", lse, at::toOpMathType(q.scalar_type()));
  check_device(kOp, "lse", lse, "q", q);
}

at::Tensor empty_like_heads(const at::Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)},
                   tensor.options())
      .transpose(1, 2);
}

Result attention_backward_cpu(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                              at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks,
                              double scale, const MaybeTensor& start,
                              const MaybeTensor& block_indices, const MaybeTensor& block_counts,
                              int64_t tile, int64_t block_size) {
  const int64_t kv_heads =
      check_heads_and_keys(kOp, q, k, v, retrieval_heads, start, std::nullopt, std::nullopt);
  check_rows(kOp, q, k, "k");
  check_mask(kOp, window, sinks, scale);
  const int64_t lists = static_cast<int64_t>(retrieval_heads.size());
  check_blocks(kOp, q, lists, block_indices, block_counts, tile, block_size);
  check_results(grad_out, q, out, lse);

  Result result{empty_like_heads(q), empty_like_heads(k), empty_like_heads(v)};
  const auto& [grad_q, grad_k, grad_v] = result;
  const at::Tensor lse_rows = lse.contiguous();
  const at::Tensor delta = at::empty_like(lse_rows);
  const auto sets =
      head_sets(retrieval_heads, q.size(1), kv_heads, block_indices.has_value(), false);
  const at::Tensor indices = block_indices ? block_indices->contiguous() : at::Tensor();
  const at::Tensor counts = block_counts ? block_counts->contiguous() : at::Tensor();
  at::Tensor start_kept;
  cpu::attention_backward_kernel(
      {.forward =
           {
               .dtype = q.scalar_type(),
               .q = heads_view(q),
               .k = heads_view(k),
               .v = heads_view(v),
               .k_local = {},
               .v_local = {},
               .out = heads_view(out),
               .lse_ptr = const_cast<void*>(lse_rows.const_data_ptr()),
               .start_ptr = start_ptr(start, start_kept),
               .start_local_ptr = nullptr,
               .block_indices_ptr = block_indices ? indices.const_data_ptr<int32_t>() : nullptr,
               .block_counts_ptr = block_counts ? counts.const_data_ptr<int32_t>() : nullptr,
               .batch = q.size(0),
               .rows = q.size(2),
               .keys = k.size(2),
               .local_keys = 0,
               .dim = q.size(3),
               .lse_heads = q.size(1),
               .lists = lists,
               .tiles = (q.size(2) + tile - 1) / tile,
               .capacity = block_indices ? block_indices->size(3) : 0,
               .tile = tile,
               .block_size = block_size,
               .window = std::min(window, k.size(2)),
               .sinks = std::min(sinks, k.size(2)),
               .scale = scale,
               .head_sets = &sets,
           },
       .grad_out = heads_view(grad_out),
       .grad_q = heads_view(grad_q),
       .grad_k = heads_view(grad_k),
       .grad_v = heads_view(grad_v),
       .delta_ptr = delta.mutable_data_ptr()});
  return result;
}

#ifdef RTPURBO_WITH_CUDA
Result attention_backward_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               at::IntArrayRef, int64_t, int64_t, double, const MaybeTensor&,
                               const MaybeTensor&, const MaybeTensor&, int64_t, int64_t) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "rtpurbo::attention: backward on CUDA is not available yet; train on the CPU");
}
#endif

}  // namespace

Result attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                          at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks,
                          double scale, const MaybeTensor& start, const MaybeTensor& block_indices,
                          const MaybeTensor& block_counts, int64_t tile, int64_t block_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::attention_backward", "")
                             .typed<decltype(attention_backward)>();
  return op.call(grad_out, q, k, v, out, lse, retrieval_heads, window, sinks, scale, start,
                 block_indices, block_counts, tile, block_size);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " int[] retrieval_heads, int window, int sinks, float scale, Tensor? start,"
      " Tensor? block_indices, Tensor? block_counts, int tile, int block_size)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("attention_backward", &attention_backward_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("attention_backward", &attention_backward_cuda); }
#endif

}  // namespace rtpurbo
