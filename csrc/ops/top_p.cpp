#include "csrc/ops/top_p.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/top_p.h"
#include "csrc/ops/common/check.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#include "csrc/ops/common/select_cuda.h"
#include "csrc/ops/common/top_p_by_sort.h"
#endif

namespace rtpurbo {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& scores, double p, int64_t min_members,
           const std::optional<at::Tensor>& forced_lse) {
  constexpr const char* kOp = "top_p";
  check_floating(kOp, "scores", scores);
  check_tensor(kOp, "scores", scores, "[rows, N]", {kAnySize, kAnySize});
  TORCH_CHECK_VALUE(scores.size(1) <= INT32_MAX,
                    "rtpurbo::top_p: scores must have N <= 2^31 - 1, got ", scores.size(1));
  TORCH_CHECK_VALUE(p > 0 && p <= 1, "rtpurbo::top_p: p must be in (0, 1], got ", p);
  TORCH_CHECK_VALUE(min_members >= 0, "rtpurbo::top_p: min_members must be >= 0, got ",
                    min_members);
  if (forced_lse) {
    check_tensor(kOp, "forced_lse", *forced_lse, "[rows]", {scores.size(0)});
    check_dtype(kOp, "forced_lse", *forced_lse, at::toOpMathType(scores.scalar_type()));
    check_device(kOp, "forced_lse", *forced_lse, "scores", scores);
  }
}

Result allocate(const at::Tensor& scores) {
  const auto ints = scores.options().dtype(at::kInt);
  const auto accum = scores.options().dtype(at::toOpMathType(scores.scalar_type()));
  return {at::empty(scores.sizes(), ints), at::empty({scores.size(0)}, ints),
          at::empty({scores.size(0)}, accum)};
}

Result top_p_cpu(const at::Tensor& scores, double p, int64_t min_members,
                 const std::optional<at::Tensor>& forced_lse, bool exact) {
  check(scores, p, min_members, forced_lse);
  Result result = allocate(scores);
  auto& [indices, counts, mass] = result;
  cpu::top_p_kernel({.dtype = scores.scalar_type(),
                     .scores_ptr = scores.const_data_ptr(),
                     .forced_lse_ptr = forced_lse ? forced_lse->const_data_ptr() : nullptr,
                     .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                     .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                     .mass_ptr = mass.mutable_data_ptr(),
                     .rows = scores.size(0),
                     .n = scores.size(1),
                     .scores_row_stride = scores.stride(0),
                     .min_members = min_members,
                     .p = p,
                     .exact = exact});
  return result;
}

#ifdef RTPURBO_WITH_CUDA
/// The scores are those of index keys of one dimension under the query 1, none of them near; the
/// forced members stand for the near keys.
cuda::SelectParams as_selection(const at::Tensor& scores, const at::Tensor& one,
                                const std::optional<at::Tensor>& forced_lse) {
  cuda::SelectParams params{};
  params.q_type = cuda::ElementType::kFloat32;
  params.k_type = cuda::element_type(scores.scalar_type());
  params.q_index.ptr = one.mutable_data_ptr();
  params.k_index = {.ptr = const_cast<void*>(scores.const_data_ptr()),
                    .batch_stride = scores.stride(0),
                    .head_stride = 0,
                    .row_stride = 1};
  params.index_map.count = 1;
  params.whole_bins = true;
  params.near_is_scored = !forced_lse;
  params.near_lse_ptr = forced_lse ? forced_lse->const_data_ptr<float>() : nullptr;
  params.batch = scores.size(0);
  params.heads = params.rows = params.dim = params.block_size = 1;
  params.keys = params.capacity = scores.size(1);
  return params;
}

Result top_p_cuda(const at::Tensor& scores, double p, int64_t min_members,
                  const std::optional<at::Tensor>& forced_lse, bool exact) {
  cuda::check_not_double("top_p", "scores", scores.scalar_type());
  check(scores, p, min_members, forced_lse);
  if (exact && scores.numel() > 0) return top_p_by_sort(scores, p, min_members, forced_lse);
  Result result = allocate(scores);
  auto& [indices, counts, mass] = result;
  if (scores.size(0) == 0) return result;
  if (scores.size(1) == 0) {
    counts.zero_();
    mass.fill_(1.0);
    if (forced_lse) mass.masked_fill_(forced_lse->lt(INFINITY).logical_not(), NAN);
    return result;
  }
  const at::Tensor one = at::ones({1}, mass.options());
  cuda::SelectParams params = as_selection(scores, one, forced_lse);
  params.indices_ptr = indices.mutable_data_ptr<int32_t>();
  params.counts_ptr = counts.mutable_data_ptr<int32_t>();
  params.mass_ptr = mass.mutable_data_ptr<float>();
  params.min_members = min_members;
  params.p = p;
  cuda::run_select("top_p", params, scores);
  return result;
}
#endif

}  // namespace

Result top_p(const at::Tensor& scores, double p, int64_t min_members,
             const std::optional<at::Tensor>& forced_lse, bool exact) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rtpurbo::top_p", "").typed<decltype(top_p)>();
  return op.call(scores, p, min_members, forced_lse, exact);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "top_p(Tensor scores, float p, int min_members=0, Tensor? forced_lse=None, bool exact=True)"
      " -> (Tensor indices, Tensor counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("top_p", &top_p_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("top_p", &top_p_cuda); }
#endif

}  // namespace rtpurbo
