#include "csrc/ops/retrieval_scores.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/retrieval_scores.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/retrieval_scores.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "retrieval_scores";

void check(const at::Tensor& q, const at::Tensor& k, int64_t pre_begin, int64_t pre_end,
           double scale, const std::optional<at::Tensor>& start) {
  TORCH_CHECK_VALUE(k.dim() == 4,
                    "rtpurbo::retrieval_scores: k must have shape [B, Hk, N, D], got ", k.sizes());
  check_qkv(kOp, q, k, k, "k", "k");
  check_rows(kOp, q, k, "k");
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "rtpurbo::retrieval_scores: q must have a multiple of the ", k.size(1),
                    " KV heads, got Hq = ", q.size(1));
  TORCH_CHECK_VALUE(q.size(2) > 0,
                    "rtpurbo::retrieval_scores: q must hold at least one needle row, got P = 0");
  TORCH_CHECK_VALUE(0 <= pre_begin && pre_begin <= pre_end && pre_end <= k.size(2),
                    "rtpurbo::retrieval_scores: [pre_begin, pre_end) must lie in [0, N = ",
                    k.size(2), "], got [", pre_begin, ", ", pre_end, ")");
  check_mask(kOp, 1, 0, scale);
  check_start(kOp, start, "q", q);
}

at::Tensor retrieval_scores_cpu(const at::Tensor& q, const at::Tensor& k, int64_t pre_begin,
                                int64_t pre_end, double scale,
                                const std::optional<at::Tensor>& start) {
  check(q, k, pre_begin, pre_end, scale, start);
  const at::Tensor scores =
      at::empty({q.size(0), q.size(1)}, q.options().dtype(at::toOpMathType(q.scalar_type())));
  at::Tensor start_kept;
  cpu::retrieval_scores_kernel({.dtype = q.scalar_type(),
                                .q = heads_view(q),
                                .k = heads_view(k),
                                .start_ptr = start_ptr(start, start_kept),
                                .scores_ptr = scores.mutable_data_ptr(),
                                .batch = q.size(0),
                                .query_heads = q.size(1),
                                .kv_heads = k.size(1),
                                .rows = q.size(2),
                                .keys = k.size(2),
                                .dim = q.size(3),
                                .pre_begin = pre_begin,
                                .pre_end = pre_end,
                                .scale = scale});
  return scores;
}

#ifdef RTPURBO_WITH_CUDA
at::Tensor retrieval_scores_cuda(const at::Tensor& q, const at::Tensor& k, int64_t pre_begin,
                                 int64_t pre_end, double scale,
                                 const std::optional<at::Tensor>& start) {
  check(q, k, pre_begin, pre_end, scale, start);
  cuda::check_not_double(kOp, "q", q.scalar_type());
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor mass =
      at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  at::Tensor start_kept;
  RTPURBO_CUDA_CHECK(kOp,
                     cuda::launch_retrieval_scores({.type = cuda::element_type(q.scalar_type()),
                                                    .q = heads_view(q),
                                                    .k = heads_view(k),
                                                    .start_ptr = start_ptr(start, start_kept),
                                                    .mass_ptr = mass.mutable_data_ptr<float>(),
                                                    .batch = q.size(0),
                                                    .query_heads = q.size(1),
                                                    .kv_heads = k.size(1),
                                                    .rows = q.size(2),
                                                    .keys = k.size(2),
                                                    .dim = q.size(3),
                                                    .pre_begin = pre_begin,
                                                    .pre_end = pre_end,
                                                    .scale = static_cast<float>(scale)},
                                                   c10::cuda::getCurrentCUDAStream()));
  return mass.mean(-1);
}
#endif

}  // namespace

at::Tensor retrieval_scores(const at::Tensor& q, const at::Tensor& k, int64_t pre_begin,
                            int64_t pre_end, double scale, const std::optional<at::Tensor>& start) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::retrieval_scores", "")
                             .typed<decltype(retrieval_scores)>();
  return op.call(q, k, pre_begin, pre_end, scale, start);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "retrieval_scores(Tensor q, Tensor k, int pre_begin, int pre_end, float scale,"
      " Tensor? start=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("retrieval_scores", &retrieval_scores_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("retrieval_scores", &retrieval_scores_cuda); }
#endif

}  // namespace rtpurbo
