#pragma once
// One launch: near keys of all heads, selection, attention to what is selected, and the merge.

#include <cooperative_groups.h>

#include <cuda/atomic>
#include <type_traits>

#include "csrc/cuda/decode/merge.cuh"
#include "csrc/cuda/decode/split_mma.cuh"
#include "csrc/cuda/select/key_heads.h"
#include "csrc/cuda/select/sieved_selector.cuh"
#include "csrc/cuda/select/team.cuh"
#include "csrc/cuda/sparse_decode/listed.cuh"
#include "csrc/cuda/sparse_decode/problem.cuh"

namespace rtpurbo::cuda::sparse {

static_assert(kMergeThreads == kSelectThreads);

/// kBlocks on a multiprocessor: one, whose few warps have many loads on their way each, is quicker
/// through the stages; two are where there is much to score, with a sieve where there is most.
template <typename T, int kDim, int kBlocks, Sifting kSifting = Sifting::kNone>
struct Shape {
  static constexpr bool kSieves = kSifting != Sifting::kNone;
  using Sieved = SievedSelector<HalfScorerOf<1>, kSifting == Sifting::kShared>;
  using Stages = std::conditional_t<kSieves, Sieved, Selector<HalfScorer>>;
  using Listed = ListedAttention<T, kDim>;
  static constexpr int kStages = kDim * kBlocks <= 128 ? 2 : 1;
  static constexpr int kNearBytes = MmaTile<kDim, kSelectWarps, kStages>::kSharedBytes;
  struct ListedShared {
    BlockList::Shared list;
    typename Listed::Shared attention;
  };
  union Shared {
    typename Stages::Shared select;
    ListedShared listed;
    MergeShared merge;
  };
};

/// A head's slot of near keys; retrieval heads have one of listed keys before it.
__device__ __forceinline__ int near_slot(const DecodeParams& p, int head) {
  return p.head_slots[head][p.head_slots[head][1] >= 0 ? 1 : 0];
}

/// The near keys' log-sum-exp of a retrieval head, for a whole warp.
__device__ inline float near_lse(const DecodeParams& p, const Partials& near, int64_t batch,
                                 int slot) {
  const PartRun run = run_of_slot(p, near, batch, slot);
  SoftmaxSum sum;
#pragma unroll 2
  for (int i = threadIdx.x % 32; i < run.count; i += 32) {
    const float2 part = __ldcg(run.stats + i * run.stride);
    sum.merge({part.x, part.y}, 1.0f);
  }
#pragma unroll 1
  for (int step = 16; step > 0; step /= 2) {
    sum.merge({__shfl_xor_sync(0xffffffffu, sum.maximum, step),
               __shfl_xor_sync(0xffffffffu, sum.sum, step)},
              1.0f);
  }
  return lse_of_octaves(sum.maximum, sum.sum);
}

template <typename T, int kDim, int kBlocks, Sifting kSifting>
__global__ __launch_bounds__(kSelectThreads, kBlocks) void sparse_decode_kernel(
    const __grid_constant__ SparseDecodeParams p, const __grid_constant__ Sets sets,
    const __grid_constant__ KeyHeads keys, const __grid_constant__ Workspace w) {
  using S = Shape<T, kDim, kBlocks, kSifting>;
  constexpr bool kSieves = S::kSieves;
  extern __shared__ __align__(128) char dynamic[];
  __shared__ typename S::Shared shared;
  const DecodeParams& d = p.decode;
  const auto grid = cooperative_groups::this_grid();
  const int64_t problems = p.select.batch * p.select.heads;
  Team team(w.select);
  team.reset();
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.done = 0;

  const auto near_items = static_cast<uint32_t>(d.batch) * sets.near_count * d.splits;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < near_items; item += gridDim.x) {
    const uint32_t pair = item / d.splits, batch = pair / sets.near_count;
    attend_split<T, kDim, kSelectWarps, S::kStages, false>(
        d, d.sets[sets.near[pair - batch * sets.near_count]], batch,
        static_cast<int>(item - pair * d.splits), w.near, dynamic);
    __syncthreads();
  }
  constexpr int kRoom = kSieves ? 2 : 1;  // of a member: with its position
  float* scores = w.select.scores ? w.select.scores + static_cast<int64_t>(blockIdx.x) *
                                                          w.select.block_members * kRoom
                                  : reinterpret_cast<float*>(dynamic);
  Members members(p.select, w.select, team, scores, kSieves);
#pragma unroll 1
  for (int64_t problem = team.number; problem < problems || problem == team.number;
       problem += w.select.teams) {
    const bool first = problem == team.number;
    const Row row = row_of(p.select, team.works ? problem : 0);
    if (!first) team.sync();  // others may still read what is cleared now
    const int own = team.rank * kSelectThreads + static_cast<int>(threadIdx.x);
    uint64_t* selected = p.selected_ptr + problem * p.words;
    if (team.works) {
      for (int64_t i = own; i < p.words; i += team.size * kSelectThreads) selected[i] = 0;
      if constexpr (!kSieves) {
        S::Stages::scan(p.select, w.select, team, row, members, shared.select);
      }
    }
    const auto meet = [&](bool whole_grid) {
      if (whole_grid) {
        grid.sync();
      } else {
        team.sync();
      }
    };
    if (!kSieves || !team.works) meet(first);
    if (!team.works) {
      if constexpr (kSieves) S::Stages::help(p.select, w.select, keys, shared.select, meet);
      break;
    }
    const DecodeSet& set = d.sets[sets.listed[row.head]];
    const int head = d.slot_heads[set.first_slot];
    const auto near_log_mass = [&] { return near_lse(d, w.near, row.batch, near_slot(d, head)); };
    Selection selection;
    if constexpr (kSieves) {
      selection = S::Stages::run(
          p.select, w.select, keys, team, row, members, shared.select,
          [&](bool whole_grid) { meet(first && whole_grid); }, near_log_mass, dynamic);
    } else {
      selection =
          S::Stages::choose(p.select, w.select, team, row, members, shared.select, near_log_mass);
    }
    if (own == 0) {
      p.select.counts_ptr[problem] = static_cast<int32_t>(selection.cut.count);
      p.select.mass_ptr[problem] = selection.mass();
    }
    __syncthreads();
    typename S::Listed attention(head_rows<const T>(d.q, row.batch, head), d.scale,
                                 shared.listed.attention);
    const int block_size = kSieves ? 1 : static_cast<int>(p.select.block_size);
    BlockList list(members, block_size, shared.listed.list);
    list.fill(selection, selected);
    const T* k = head_rows<const T>(d.k, row.batch, set.kv_head);
    const T* v = head_rows<const T>(d.v, row.batch, set.kv_head);
    const int shift = member_shift(block_size);
    for (int begin = 0; begin < list.total(); begin += BlockList::kAtOnce) {
      const int count = list.gather(begin);
      attention.add(k, d.k.row_stride, v, d.v.row_stride, count << shift, [&](int j) {
        const int member = shared.listed.list.members[j >> shift];
        if (kSieves) return member;  // a far key
        const int n = (member << shift) + (j & (block_size - 1));
        return n >= row.far_begin && n < row.far_end ? n : -1;
      });
    }
    const int64_t place = problem * team.size + team.rank;
    attention.finish(w.listed.sums + place * kDim, w.listed.stats + place);
  }

  constexpr int kColumnRuns = kDim / kMergeColumns;
  const int64_t merge_items = d.batch * d.heads * kColumnRuns;
  const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> done(*w.done);
  __syncthreads();
  if (threadIdx.x == 0) {
    done.fetch_add(1, ::cuda::memory_order_acq_rel);
    while (blockIdx.x < merge_items && done.load(::cuda::memory_order_acquire) < gridDim.x) {
    }
  }
  __syncthreads();
  const bool alone = merges_alone(merge_items, gridDim.x, d.splits + team.size);
  const uint32_t mergers = alone ? gridDim.x * kMergeWarps : gridDim.x;
  for (uint32_t i = merger_number(alone); i < merge_items; i += mergers) {
    const MergeItem item(i, static_cast<uint32_t>(d.heads), kColumnRuns);
    const int64_t batch = item.batch, head = item.head;
    const int list = sets.list_of_head[head];
    Parts parts{.dim = kDim};
    parts.first = run_of_slot(d, w.near, batch, near_slot(d, head));
    if (list >= 0) {
      const int64_t place = (batch * p.select.heads + list) * team.size;
      parts.second = {w.listed.sums + place * kDim, w.listed.stats + place, 1, team.size};
    }
    merge_columns(parts, alone, item.first_column, head_rows<T>(d.out, batch, head),
                  d.lse_ptr + batch * d.heads + head, shared.merge);
  }
}

template <typename T, int kDim, int kBlocks, Sifting kSifting>
Form form_with() {
  return {reinterpret_cast<const void*>(sparse_decode_kernel<T, kDim, kBlocks, kSifting>), kBlocks,
          kSifting, Shape<T, kDim, kBlocks, kSifting>::kNearBytes};
}

template <typename T, int kDim>
Form form_of(int blocks_of_sm, Sifting sifting) {
  if constexpr (kDim <= 128) {
    if (sifting == Sifting::kShared) return form_with<T, kDim, 2, Sifting::kShared>();
    if (sifting == Sifting::kAlone) return form_with<T, kDim, 2, Sifting::kAlone>();
    if (blocks_of_sm == 2) return form_with<T, kDim, 2, Sifting::kNone>();
  }
  return form_with<T, kDim, 1, Sifting::kNone>();
}

}  // namespace rtpurbo::cuda::sparse
