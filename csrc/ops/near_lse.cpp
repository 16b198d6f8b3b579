#include "csrc/ops/near_lse.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/attention.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/cuda/near_lse.h"
#include "csrc/ops/common/attention_cuda.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "near_lse";

void check_indices(const char* name, at::IntArrayRef heads, int64_t num_heads) {
  for (const int64_t head : heads) {
    TORCH_CHECK_VALUE(head >= 0 && head < num_heads, "rtpurbo::near_lse: ", name,
                      " must be head numbers in [0, ", num_heads, "), got ", heads);
  }
}

/// The checked arguments as kernel parameters, with the result and the tensors that these point
/// into.
class Arguments {
 public:
  Arguments(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef q_heads,
            at::IntArrayRef k_heads, int64_t window, int64_t sinks, double scale,
            const std::optional<at::Tensor>& start) {
    TORCH_CHECK_VALUE(k.dim() == 4, "rtpurbo::near_lse: k must have shape [B, Hk, N, D], got ",
                      k.sizes());
    check_qkv(kOp, q, k, k, "k", "k");
    check_rows(kOp, q, k, "k");
    check_mask(kOp, window, sinks, scale);
    check_start(kOp, start, "q", q);
    check_indices("q_heads", q_heads, q.size(1));
    check_indices("k_heads", k_heads, k.size(1));
    TORCH_CHECK_VALUE(q_heads.size() == k_heads.size(),
                      "rtpurbo::near_lse: k_heads must name the key head of each of the ",
                      q_heads.size(), " q_heads, got ", k_heads.size());
    const int64_t count = static_cast<int64_t>(q_heads.size());
    constexpr size_t kHeadsPerSet = 16;
    for (int64_t j = 0; j < count; ++j) {
      if (sets_.empty() || sets_.back().kv_head != k_heads[j] ||
          sets_.back().heads.size() == kHeadsPerSet) {
        sets_.push_back({cpu::KeySet::kNear, false, k_heads[j], -1, {}, {}});
      }
      sets_.back().heads.push_back(q_heads[j]);
      sets_.back().lse_heads.push_back(j);
    }
    lse_ = at::empty({q.size(0), count, q.size(2)},
                     q.options().dtype(at::toOpMathType(q.scalar_type())));
    params_ = {
        .dtype = q.scalar_type(),
        .q = heads_view(q),
        .k = heads_view(k),
        .v = {},
        .k_local = {},
        .v_local = {},
        .out = {},
        .lse_ptr = lse_.mutable_data_ptr(),
        .start_ptr = start_ptr(start, start_),
        .start_local_ptr = nullptr,
        .block_indices_ptr = nullptr,
        .block_counts_ptr = nullptr,
        .batch = q.size(0),
        .rows = q.size(2),
        .keys = k.size(2),
        .local_keys = 0,
        .dim = q.size(3),
        .lse_heads = count,
        .lists = 0,
        .tiles = 0,
        .capacity = 0,
        .tile = 1,
        .block_size = 1,
        .window = std::min(window, k.size(2)),
        .sinks = std::min(sinks, k.size(2)),
        .scale = scale,
        .head_sets = &sets_,
    };
  }
  Arguments(const Arguments&) = delete;

  const cpu::AttentionParams& params() const { return params_; }
  const at::Tensor& lse() const { return lse_; }

 private:
  at::Tensor lse_, start_;
  std::vector<cpu::HeadSet> sets_;
  cpu::AttentionParams params_;
};

at::Tensor near_lse_cpu(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef q_heads,
                        at::IntArrayRef k_heads, int64_t window, int64_t sinks, double scale,
                        const std::optional<at::Tensor>& start) {
  const Arguments arguments(q, k, q_heads, k_heads, window, sinks, scale, start);
  cpu::attention_kernel(arguments.params());
  return arguments.lse();
}

#ifdef RTPURBO_WITH_CUDA
at::Tensor near_lse_cuda(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef q_heads,
                         at::IntArrayRef k_heads, int64_t window, int64_t sinks, double scale,
                         const std::optional<at::Tensor>& start) {
  constexpr int32_t kFewRows = 16;  // too few tiles to fill a device
  const Arguments arguments(q, k, q_heads, k_heads, window, sinks, scale, start);
  cuda::for_head_tables(
      kOp, q, arguments.params(), [&](const cuda::AttentionParams& params, cudaStream_t stream) {
        if (params.rows > kFewRows) return cuda::launch_attention(params, stream);
        const at::Tensor partials = at::empty(
            {params.batch, params.heads.near, params.rows, cuda::near_lse_splits(params), 2},
            q.options().dtype(at::kFloat));
        return cuda::launch_near_lse(params, partials.mutable_data_ptr<float>(), stream);
      });
  return arguments.lse();
}
#endif

}  // namespace

at::Tensor near_lse(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef q_heads,
                    at::IntArrayRef k_heads, int64_t window, int64_t sinks, double scale,
                    const std::optional<at::Tensor>& start) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::near_lse", "")
                             .typed<decltype(near_lse)>();
  return op.call(q, k, q_heads, k_heads, window, sinks, scale, start);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "near_lse(Tensor q, Tensor k, int[] q_heads, int[] k_heads, int window, int sinks,"
      " float scale, Tensor? start=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("near_lse", &near_lse_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("near_lse", &near_lse_cuda); }
#endif

}  // namespace rtpurbo
