#include "csrc/ops/attention.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/attention.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/attention_cuda.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "attention";

using Result = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

/// The checked arguments as kernel parameters, with the results and the tensors that these point
/// into.
class Arguments {
 public:
  Arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
            at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks, double scale,
            const MaybeTensor& start, const MaybeTensor& k_local, const MaybeTensor& v_local,
            const MaybeTensor& start_local, const MaybeTensor& block_indices,
            const MaybeTensor& block_counts, int64_t tile, int64_t block_size) {
    const int64_t kv_heads =
        check_heads_and_keys(kOp, q, k, v, retrieval_heads, start, k_local, v_local);
    TORCH_CHECK_VALUE(
        k_local || !start_local,
        "rtpurbo::attention: start_local must be None without k_local and v_local, got "
        "a tensor; give the rings that it counts for, too");
    check_start(kOp, start_local, "q", q, "start_local");
    check_rows(kOp, q, k, "k");
    if (k_local) check_rows(kOp, q, *k_local, "k_local");
    check_mask(kOp, window, sinks, scale);
    const int64_t lists = static_cast<int64_t>(retrieval_heads.size());
    check_blocks(kOp, q, lists, block_indices, block_counts, tile, block_size);

    out_ = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
    lse_ = at::empty({q.size(0), q.size(1), q.size(2)},
                     q.options().dtype(at::toOpMathType(q.scalar_type())));
    sets_ = head_sets(retrieval_heads, q.size(1), kv_heads, block_indices.has_value(),
                      k_local.has_value());
    if (block_indices) indices_ = block_indices->contiguous();
    if (block_counts) counts_ = block_counts->contiguous();
    const int64_t length = std::max(k.size(2), k_local ? k_local->size(2) : 0);
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
        .start_local_ptr = start_ptr(start_local, start_local_),
        .block_indices_ptr = block_indices ? indices_.const_data_ptr<int32_t>() : nullptr,
        .block_counts_ptr = block_counts ? counts_.const_data_ptr<int32_t>() : nullptr,
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
        .head_sets = &sets_,
    };
  }
  Arguments(const Arguments&) = delete;

  const cpu::AttentionParams& params() const { return params_; }
  Result result() const { return {out_, lse_}; }

 private:
  at::Tensor out_, lse_, indices_, counts_, start_, start_local_;
  std::vector<cpu::HeadSet> sets_;
  cpu::AttentionParams params_;
};

Result attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks, double scale,
                     const MaybeTensor& start, const MaybeTensor& k_local,
                     const MaybeTensor& v_local, const MaybeTensor& start_local,
                     const MaybeTensor& block_indices, const MaybeTensor& block_counts,
                     int64_t tile, int64_t block_size) {
  const Arguments arguments(q, k, v, retrieval_heads, window, sinks, scale, start, k_local, v_local,
                            start_local, block_indices, block_counts, tile, block_size);
  cpu::attention_kernel(arguments.params());
  return arguments.result();
}

#ifdef RTPURBO_WITH_CUDA
Result attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      at::IntArrayRef retrieval_heads, int64_t window, int64_t sinks, double scale,
                      const MaybeTensor& start, const MaybeTensor& k_local,
                      const MaybeTensor& v_local, const MaybeTensor& start_local,
                      const MaybeTensor& block_indices, const MaybeTensor& block_counts,
                      int64_t tile, int64_t block_size) {
  const Arguments arguments(q, k, v, retrieval_heads, window, sinks, scale, start, k_local, v_local,
                            start_local, block_indices, block_counts, tile, block_size);
  cuda::for_head_tables(
      kOp, q, arguments.params(), [&](cuda::AttentionParams params, cudaStream_t stream) {
        const at::Tensor parts =
            at::empty({cuda::attention_parts(params)}, q.options().dtype(at::kFloat));
        params.parts_ptr = parts.numel() > 0 ? parts.mutable_data_ptr<float>() : nullptr;
        return cuda::launch_attention(params, stream);
      });
  return arguments.result();
}
#endif

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
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("attention", &attention_cuda); }
#endif

}  // namespace rtpurbo
