#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/select_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"

namespace rtpurbo::cuda {

SelectParams select_params(const char* op, const cpu::IndexParams& in) {
  check_index(op, in);
  return {.q_type = element_type(in.q_dtype),
          .k_type = element_type(in.k_dtype),
          .q_index = in.q_index,
          .k_index = in.k_index,
          .codes = in.codes,
          .ranges = in.ranges,
          .coded = in.coded,
          .code_bits = static_cast<int>(in.code_bits),
          .refine = in.refine,
          .index_map = head_list(op, "index_map", {in.index_map, static_cast<size_t>(in.heads)}),
          .whole_bins = false,
          .near_is_scored = in.near_lse_ptr == nullptr,
          .near_lse_ptr = static_cast<const float*>(in.near_lse_ptr),
          .offset_ptr = static_cast<const float*>(in.offset_ptr),
          .start_ptr = in.start_ptr,
          .indices_ptr = nullptr,
          .counts_ptr = nullptr,
          .mass_ptr = nullptr,
          .batch = in.batch,
          .heads = in.heads,
          .rows = in.rows,
          .keys = in.keys,
          .dim = in.dim,
          .window = in.window,
          .sinks = in.sinks,
          .block_size = in.block_size,
          .capacity = 0,
          .min_members = 0,
          .p = 1.0};
}

void run_select(const char* op, const SelectParams& params, const at::Tensor& on) {
  const int64_t problems = params.batch * params.heads * params.rows;
  TORCH_CHECK_VALUE(problems <= UINT32_MAX, "rtpurbo::", op,
                    ": on CUDA there must be fewer than 2^32 rows to select from, got ", problems,
                    "; call it on a part of them at a time");
  const c10::cuda::CUDAGuard guard(on.device());
  SelectPlan plan;
  RTPURBO_CUDA_CHECK(op, plan_select(params, plan));
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(plan.workspace_bytes)}, on.options().dtype(at::kByte));
  RTPURBO_CUDA_CHECK(op, launch_select(params, plan, workspace.mutable_data_ptr(),
                                       c10::cuda::getCurrentCUDAStream()));
}

}  // namespace rtpurbo::cuda
#endif
