#include <cooperative_groups.h>

#include <algorithm>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/decode/merge.cuh"
#include "csrc/cuda/decode/split_mma.cuh"
#include "csrc/cuda/integers.h"
#include "csrc/cuda/residency.h"
#include "csrc/cuda/select/key_heads.h"
#include "csrc/cuda/select/plan.h"
#include "csrc/cuda/select/sieved_selector.cuh"
#include "csrc/cuda/sparse_decode.h"
#include "csrc/cuda/sparse_decode/listed.cuh"
#include "csrc/cuda/workspace.h"

namespace rtpurbo::cuda {
namespace {

static_assert(kMergeThreads == kSelectThreads);

/// A team's and the grid's results in the workspace.
struct Workspace {
  SelectWorkspace select;
  Partials near;    // of splits and slots
  Partials listed;  // [B, R, team_size]
  uint32_t* done;   // blocks whose parts are written
};

/// Sets by what is done with them.
struct Sets {
  int near_count = 0;
  int16_t near[DecodeParams::kMaxSets];
  int16_t listed[DecodeParams::kMaxHeads];        // set of each list
  int16_t list_of_head[DecodeParams::kMaxHeads];  // -1: none
};

/// Whether a sieve holds back members, and whether heads that share index keys are scanned
/// together.
enum class Sifting { kNone, kAlone, kShared };

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
__device__ float near_lse(const DecodeParams& p, const Partials& near, int64_t batch, int slot) {
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

/// Two blocks on a multiprocessor where each of them has this many scores to keep.
constexpr int64_t kManyScores = 8192;

int64_t members_of(const SparseDecodeParams& p) {
  return divide_up(p.select.keys, p.select.block_size);
}

/// What attention to a list takes, in members to score: a key and its ranking take as long as 64
/// bytes, which a selected row of k and v has dim / 16 times.
int64_t listed_members(const SparseDecodeParams& p) {
  const int64_t listed = p.select.block_size * std::min(p.select.min_members, members_of(p));
  return listed * p.decode.dim / 16;
}

bool wants_two_blocks(const SparseDecodeParams& p, int sm_count) {
  return p.decode.dim <= 128 &&
         p.select.batch * p.select.heads * members_of(p) > kManyScores * sm_count;
}

/// Calls fn(shape) for the element type, head dim and blocks; cudaErrorNotSupported for others.
template <typename Fn>
cudaError_t dispatch_shape(const DecodeParams& p, int blocks_of_sm, Sifting sifting, const Fn& fn) {
  return dispatch_element(p.type, [&](auto element) {
    using T = decltype(element);
    const auto by_blocks = [&]<int kDim>(std::integral_constant<int, kDim>) {
      if (sifting == Sifting::kShared) return fn(Shape<T, kDim, 2, Sifting::kShared>());
      if (sifting == Sifting::kAlone) return fn(Shape<T, kDim, 2, Sifting::kAlone>());
      return blocks_of_sm == 2 ? fn(Shape<T, kDim, 2>()) : fn(Shape<T, kDim, 1>());
    };
    if constexpr (sizeof(T) == 2) {
      if (p.dim == 64) return by_blocks(std::integral_constant<int, 64>());
      if (p.dim == 128) return by_blocks(std::integral_constant<int, 128>());
      if (p.dim == 256) return fn(Shape<T, 256, 1>());
    }
    return cudaErrorNotSupported;
  });
}

Sets sort_sets(const DecodeParams& p) {
  Sets sets;
  std::fill(std::begin(sets.list_of_head), std::end(sets.list_of_head), int16_t{-1});
  for (int i = 0; i < p.sets_count; ++i) {
    const DecodeSet& set = p.sets[i];
    if (set.keys == DecodeKeys::kListed) {
      sets.listed[set.list] = static_cast<int16_t>(i);
      sets.list_of_head[p.slot_heads[set.first_slot]] = set.list;
    } else {
      sets.near[sets.near_count++] = static_cast<int16_t>(i);
    }
  }
  return sets;
}

int near_splits(const DecodeParams& p, int near_sets, int blocks) {
  constexpr int64_t kTile = kProductKeys * kSelectWarps;
  const int64_t window = std::max(p.window, p.near_window) + p.sinks;
  const int64_t most = std::min(std::max(window, p.slots), p.length);
  const int64_t wanted = blocks / std::max<int64_t>(1, p.batch * near_sets);
  return static_cast<int>(
      std::max<int64_t>(1, std::min({wanted, divide_up(most, kTile), kMostSplits})));
}

/// Takes the workspace apart, or with a null base only measures it.
size_t lay_out(const SparseDecodeParams& p, const SparseDecodePlan& plan, char* base,
               Workspace& w) {
  WorkspaceParts parts{base, lay_out(p.select, plan.select, 0, base, w.select)};
  const int64_t near = p.decode.batch * plan.near_splits * p.decode.slots_count;
  const int64_t listed = p.select.batch * p.select.heads * plan.select.team_size;
  parts.take(w.near.sums, near * p.decode.dim);
  parts.take(w.near.stats, near);
  parts.take(w.listed.sums, listed * p.decode.dim);
  parts.take(w.listed.stats, listed);
  parts.take(w.done, 1);
  return parts.bytes;
}

/// Whether rows may be loaded 16 bytes at a time, and index keys whole.
bool takes(const SparseDecodeParams& p) {
  constexpr int64_t kSize = 2;
  const DecodeParams& d = p.decode;
  return d.type != ElementType::kFloat32 && p.select.k_type == ElementType::kFloat16 &&
         keys_are_wide(p.select) && rows_are_aligned(d.q, kSize) && rows_are_aligned(d.k, kSize) &&
         rows_are_aligned(d.v, kSize) && rows_are_aligned(d.k_local, kSize) &&
         rows_are_aligned(d.v_local, kSize) && has_short_rows(d);
}

template <typename T, int kDim, int kBlocks, Sifting kSifting>
cudaError_t plan_shape(const SparseDecodeParams& p, SparseDecodePlan& plan) {
  using S = Shape<T, kDim, kBlocks, kSifting>;
  Residency residency;
  if (const cudaError_t error = find_residency(
          reinterpret_cast<const void*>(sparse_decode_kernel<T, kDim, kBlocks, kSifting>),
          kSelectThreads, kBlocks, S::kNearBytes, residency)) {
    return error;
  }
  plan.blocks_of_sm = kBlocks;
  plan.select =
      plan_teams(p.select, residency.blocks, residency.shared_bytes, listed_members(p), S::kSieves);
  plan.select.shared_bytes = std::max<size_t>(plan.select.shared_bytes, S::kNearBytes);
  if (S::kSieves) {
    plan.select.scores_in_shared = false;
    plan.select.shared_bytes = residency.shared_bytes;
  }
  if (kSifting == Sifting::kShared) {
    plan.select.shared_blocks = shared_scan_blocks(p.select, plan.select);
  }
  plan.near_splits = near_splits(p.decode, sort_sets(p.decode).near_count, residency.blocks);
  Workspace w;
  plan.workspace_bytes = lay_out(p, plan, nullptr, w);
  return cudaSuccess;
}

Sifting sifting_of(const SelectPlan& plan) {
  return plan.shared_blocks > 0 ? Sifting::kShared : plan.sieves ? Sifting::kAlone : Sifting::kNone;
}

}  // namespace

cudaError_t plan_sparse_decode(const SparseDecodeParams& params, int sm_count,
                               SparseDecodePlan& plan) {
  if (!takes(params)) return cudaErrorNotSupported;
  const auto plan_with = [&](int blocks, Sifting sifting) {
    return dispatch_shape(params.decode, blocks, sifting,
                          [&]<typename T, int kDim, int kBlocks, Sifting kSifting>(
                              Shape<T, kDim, kBlocks, kSifting>) {
                            return plan_shape<T, kDim, kBlocks, kSifting>(params, plan);
                          });
  };
  const int blocks = wants_two_blocks(params, sm_count) ? 2 : 1;
  cudaError_t error = plan_with(blocks, Sifting::kNone);
  if (error == cudaSuccess && blocks == 2) {
    const SelectPlan sieving =
        plan_teams(params.select, plan.select.blocks, 0, listed_members(params), true);
    if (may_sift(params.select, sieving) && sieving.time < plan.select.time) {
      const bool shares = shared_scan_blocks(params.select, sieving) > 0;
      if (shares) error = plan_with(2, Sifting::kShared);
      if (!shares || sifting_of(plan.select) != Sifting::kShared) {
        error = plan_with(2, Sifting::kAlone);
      }
    }
  }
  // Where shared memory is small, the other shape may still fit.
  if (error == cudaErrorCooperativeLaunchTooLarge) error = plan_with(2, Sifting::kNone);
  return error == cudaErrorCooperativeLaunchTooLarge ? cudaErrorNotSupported : error;
}

cudaError_t launch_sparse_decode(const SparseDecodeParams& params, const SparseDecodePlan& plan,
                                 void* workspace, cudaStream_t stream) {
  SparseDecodeParams p = params;
  p.decode.splits = plan.near_splits;
  Workspace w;
  lay_out(p, plan, static_cast<char*>(workspace), w);
  Sets sets = sort_sets(p.decode);
  KeyHeads keys = plan.select.shared_blocks > 0 ? KeyHeads(p.select) : KeyHeads();
  return dispatch_shape(
      p.decode, plan.blocks_of_sm, sifting_of(plan.select),
      [&]<typename T, int kDim, int kBlocks, Sifting kSifting>(Shape<T, kDim, kBlocks, kSifting>) {
        void* arguments[] = {&p, &sets, &keys, &w};
        return cudaLaunchCooperativeKernel(
            reinterpret_cast<const void*>(sparse_decode_kernel<T, kDim, kBlocks, kSifting>),
            dim3(plan.select.blocks), dim3(kSelectThreads), arguments, plan.select.shared_bytes,
            stream);
      });
}

}  // namespace rtpurbo::cuda
