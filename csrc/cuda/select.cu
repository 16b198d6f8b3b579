#include <cooperative_groups.h>

#include <type_traits>

#include "csrc/cuda/residency.h"
#include "csrc/cuda/select.h"
#include "csrc/cuda/select/emit.cuh"
#include "csrc/cuda/select/plan.h"

namespace rtpurbo::cuda {
namespace {

template <typename Scorer, bool kRefine>
__global__ __launch_bounds__(kSelectThreads,
                             2) void select_kernel(const __grid_constant__ SelectParams p,
                                                   const __grid_constant__ SelectWorkspace w) {
  using Stages = Selector<Scorer, kRefine>;
  __shared__ union {
    typename Stages::Shared select;
    Emit::Shared emit;
  } shared;
  extern __shared__ __align__(16) float shared_scores[];
  Team team(w);
  float* scores =
      w.scores ? w.scores + static_cast<int64_t>(blockIdx.x) * w.block_members : shared_scores;
  Members members(p, w, team, scores);
  uint64_t* selected = w.selected + team.number * w.groups;
  uint32_t* chunk_counts = w.chunk_counts + team.number * w.chunks;
  const int64_t problems = p.batch * p.heads * p.rows;
  team.reset();
  if (!team.works) {
    cooperative_groups::this_grid().sync();
    return;
  }
  for (int64_t problem = team.number; problem < problems; problem += w.teams) {
    const bool first = problem == team.number;
    if (!first) team.sync();  // others may still read what is cleared now
    const int own = team.rank * kSelectThreads + static_cast<int>(threadIdx.x);
    const int all = team.size * kSelectThreads;
    for (int64_t i = own; i < w.groups; i += all) selected[i] = 0;
    for (int64_t i = own; i < w.chunks; i += all) chunk_counts[i] = 0;
    const Row row = row_of(p, problem);
    Stages::scan(p, w, team, row, members, shared.select);
    if (first) {
      cooperative_groups::this_grid().sync();
    } else {
      team.sync();
    }
    const auto near_log_mass = [&] { return p.near_lse_ptr[problem]; };
    const Selection selection =
        Stages::choose(p, w, team, row, members, shared.select, near_log_mass);
    int32_t* indices = p.indices_ptr + problem * p.capacity;
    const int64_t count = selection.cut.count;
    const bool fits = count <= p.capacity;
    if (own == 0) {
      p.counts_ptr[problem] = fits ? static_cast<int32_t>(count) : -1;
      p.mass_ptr[problem] = selection.mass();
    }
    for (int64_t i = (fits ? count : 0) + own; i < p.capacity; i += all) indices[i] = -1;
    if (!fits) continue;
    for_each_chosen(selection, members, members.count(), [&](int i, uint32_t in) {
      mark_chosen(members, i, in, static_cast<int>(p.block_size), selected);
      Emit::count(members, i, in, static_cast<int>(p.block_size), chunk_counts);
    });
    team.sync();
    Emit::write(team, w, static_cast<int>(p.block_size), selected, chunk_counts, indices,
                shared.emit);
  }
}

template <bool kRefine>
const void* kernel_of(ElementType k_type, bool wide) {
  const void* kernel = nullptr;
  dispatch_element(k_type, [&](auto element) {
    using TK = decltype(element);
    using Wide = std::conditional_t<std::is_same_v<TK, __half>, HalfScorer, WideScorer<TK>>;
    kernel = wide ? reinterpret_cast<const void*>(select_kernel<Wide, kRefine>)
                  : reinterpret_cast<const void*>(select_kernel<AnyScorer<TK>, kRefine>);
    return cudaSuccess;
  });
  return kernel;
}

const void* kernel_of(const SelectParams& p) {
  const bool wide = keys_are_wide(p);
  return p.refine ? kernel_of<true>(p.k_type, wide) : kernel_of<false>(p.k_type, wide);
}

}  // namespace

cudaError_t plan_select(const SelectParams& params, SelectPlan& plan) {
  constexpr int kBlocksOfSm = 2;
  Residency residency;
  if (const cudaError_t error =
          find_residency(kernel_of(params), kSelectThreads, kBlocksOfSm, 0, residency)) {
    return error;
  }
  plan = plan_teams(params, residency.blocks, residency.shared_bytes);
  SelectWorkspace w;
  plan.workspace_bytes = lay_out(params, plan, plan.teams, nullptr, w);
  return cudaSuccess;
}

cudaError_t launch_select(const SelectParams& params, const SelectPlan& plan, void* workspace,
                          cudaStream_t stream) {
  SelectWorkspace w;
  lay_out(params, plan, plan.teams, static_cast<char*>(workspace), w);
  void* arguments[] = {const_cast<SelectParams*>(&params), &w};
  return cudaLaunchCooperativeKernel(kernel_of(params), dim3(plan.blocks), dim3(kSelectThreads),
                                     arguments, plan.shared_bytes, stream);
}

}  // namespace rtpurbo::cuda
