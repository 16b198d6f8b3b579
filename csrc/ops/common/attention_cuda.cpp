#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/attention_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <vector>

#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"

namespace rtpurbo::cuda {
namespace {

constexpr int64_t kMaxKeys = int64_t{1} << 30;  // positions, and sums of two, are 32-bit

void check_limits(const char* op, const cpu::AttentionParams& params) {
  check_not_double(op, "q", params.dtype);
  TORCH_CHECK_VALUE(params.dim <= kMaxHeadDim, "rtpurbo::", op,
                    ": q on CUDA must have a head dim D of at most ", kMaxHeadDim, ", got ",
                    params.dim, "; call it on the CPU");
  TORCH_CHECK_VALUE(std::max(params.keys, params.local_keys) <= kMaxKeys, "rtpurbo::", op,
                    ": k on CUDA must hold at most 2^30 keys, got ",
                    std::max(params.keys, params.local_keys));
}

/// Jobs of all heads, those of one role adjacent: first retrieval heads, then near ones.
std::vector<HeadJob> head_jobs(const std::vector<cpu::HeadSet>& sets) {
  std::vector<HeadJob> jobs;
  for (const bool near : {false, true}) {
    for (const cpu::HeadSet& set : sets) {
      if ((set.keys == cpu::KeySet::kNear) != near) continue;
      for (size_t i = 0; i < set.heads.size(); ++i) {
        jobs.push_back({.head = static_cast<int32_t>(set.heads[i]),
                        .kv_head = static_cast<int32_t>(set.kv_head),
                        .lse_head = static_cast<int32_t>(set.lse_heads[i]),
                        .list = static_cast<int32_t>(set.list),
                        .near = near,
                        .from_local = set.from_local});
      }
    }
  }
  return jobs;
}

}  // namespace

void for_head_tables(const char* op, const at::Tensor& q, const cpu::AttentionParams& params,
                     const AttentionLaunch& launch) {
  check_limits(op, params);
  if (params.batch == 0 || params.rows == 0) return;
  AttentionParams part{.type = element_type(params.dtype),
                       .q = params.q,
                       .k = params.k,
                       .v = params.v,
                       .k_local = params.k_local,
                       .v_local = params.v_local,
                       .out = params.out,
                       .lse_ptr = static_cast<float*>(params.lse_ptr),
                       .start_ptr = params.start_ptr,
                       .start_local_ptr = params.start_local_ptr,
                       .block_indices_ptr = params.block_indices_ptr,
                       .block_counts_ptr = params.block_counts_ptr,
                       .batch = params.batch,
                       .lse_heads = params.lse_heads,
                       .lists = params.lists,
                       .tiles = params.tiles,
                       .capacity = params.capacity,
                       .rows = static_cast<int32_t>(params.rows),
                       .keys = static_cast<int32_t>(params.keys),
                       .local_keys = static_cast<int32_t>(params.local_keys),
                       .dim = static_cast<int32_t>(params.dim),
                       .tile = static_cast<int32_t>(std::min(params.tile, params.rows)),
                       .block_size = static_cast<int32_t>(
                           std::min(params.block_size, std::max<int64_t>(1, params.keys))),
                       .window = static_cast<int32_t>(params.window),
                       .sinks = static_cast<int32_t>(params.sinks),
                       .scale = static_cast<float>(params.scale),
                       .heads = {}};
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor ticket = at::empty({1}, q.options().dtype(at::kInt));
  part.ticket_ptr = reinterpret_cast<uint32_t*>(ticket.mutable_data_ptr<int32_t>());
  const std::vector<HeadJob> jobs = head_jobs(*params.head_sets);
  for (size_t first = 0; first < jobs.size(); first += HeadTable::kMax) {
    const size_t end = std::min(jobs.size(), first + HeadTable::kMax);
    part.heads.retrieval = part.heads.near = 0;
    for (size_t i = first; i < end; ++i) {
      part.heads.jobs[i - first] = jobs[i];
      ++(jobs[i].near ? part.heads.near : part.heads.retrieval);
    }
    RTPURBO_CUDA_CHECK(op, launch(part, c10::cuda::getCurrentCUDAStream()));
  }
}

}  // namespace rtpurbo::cuda
#endif
