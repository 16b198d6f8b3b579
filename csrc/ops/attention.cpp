#include "csrc/ops/attention.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/attention.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"

namespace rtpurbo {
namespace {

constexpr const char* kOp = "attention";

using Result = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks, double scale,
                     const MaybeTensor& start, const MaybeTensor& k_local,
                     const MaybeTensor& v_local, const MaybeTensor& start_local,
                     const MaybeTensor& block_indices, const MaybeTensor& block_counts,
                     int64_t tile, int64_t block_size) {
  const int64_t kv_heads =
      check_heads_and_keys(kOp, q, k, v, retrieval_heads, start, k_local, v_local);
  TORCH_CHECK_VALUE(k_local || !start_local,
                    "rtpurbo::attention: start_local needs k_local and v_local");
  check_start(kOp, start_local, q.size(0), q, "start_local");
  check_rows(kOp, q, k, "k");
  if (k_local) check_rows(kOp, q, *k_local, "k_local");
  check_mask(kOp, window, sinks, scale);
  const int64_t lists = static_cast<int64_t>(retrieval_heads.size());
  check_blocks(kOp, q, lists, block_indices, block_counts, tile, block_size);

  const at::Tensor out =
      at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
  const at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)},
                                   q.options().dtype(at::toOpMathType(q.scalar_type())));
  const auto sets = head_sets(retrieval_heads, q.size(1), kv_heads, block_indices.has_value(),
                              k_local.has_value());
  const at::Tensor indices = block_indices ? block_indices->contiguous() : at::Tensor();
  const at::Tensor counts = block_counts ? block_counts->contiguous() : at::Tensor();
  at::Tensor start_kept;
  at::Tensor start_local_kept;
  const int64_t length = std::max(k.size(2), k_local ? k_local->size(2) : 0);
  cpu::attention_kernel({
      .dtype = q.scalar_type(),
      .q = heads_view(q),
      .k = heads_view(k),
      .v = heads_view(v),
      .k_local = k_local ? heads_view(*k_local) : HeadsView{},
      .v_local = v_local ? heads_view(*v_local) : HeadsView{},
      .out = heads_view(out),
      .lse_ptr = lse.mutable_data_ptr(),
      .start_ptr = start_ptr(start, start_kept),
      .start_local_ptr = start_ptr(start_local, start_local_kept),
      .block_indices_ptr = block_indices ? indices.const_data_ptr<int32_t>() : nullptr,
      .block_counts_ptr = block_counts ? counts.const_data_ptr<int32_t>() : nullptr,
      .batch = q.size(0),
      .rows = q.size(2),
      .keys = k.size(2),
      .local_keys = k_local ? k_local->size(2) : 0,
      .dim = q.size(3),
      .lse_heads = q.size(1),
      .lists = lists,
      .tiles = (q.size(2) + tile - 1) / tile,
      .capacity = block_indices ? block_indices->size(3) : 0,
      .tile = tile,
      .block_size = block_size,
      .window = std::min(window, length),
      .sinks = std::min(sinks, length),
      .scale = scale,
      .head_sets = &sets,
  });
  return {out, lse};
}

}  // namespace

Result attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks, double scale,
                 const MaybeTensor& start, const MaybeTensor& k_local, const MaybeTensor& v_local,
                 const MaybeTensor& start_local, const MaybeTensor& block_indices,
                 const MaybeTensor& block_counts, int64_t tile, int64_t block_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::attention", "")
                             .typed<decltype(attention)>();
  return op.call(q, k, v, retrieval_heads, window, sinks, scale, start, k_local, v_local,
                 start_local, block_indices, block_counts, tile, block_size);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, int[] retrieval_heads, int window, int sinks,"
      " float scale, Tensor? start=None, Tensor? k_local=None, Tensor? v_local=None,"
      " Tensor? start_local=None, Tensor? block_indices=None, Tensor? block_counts=None,"
      " int tile=128, int block_size=64) -> (Tensor out, Tensor lse)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("attention", &attention_cpu); }

}  // namespace rtpurbo
