#include <algorithm>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/decode/merge.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/integers.h"
#include "csrc/cuda/residency.h"
#include "csrc/cuda/select/key_heads.h"
#include "csrc/cuda/select/plan.h"
#include "csrc/cuda/sparse_decode.h"
#include "csrc/cuda/sparse_decode/problem.cuh"
#include "csrc/cuda/workspace.h"

namespace rtpurbo::cuda {
namespace {

using sparse::Form;
using sparse::form_of;
using sparse::Sets;
using sparse::Sifting;
using sparse::Workspace;

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

/// Without a kernel for other types and dims.
Form form_for(const DecodeParams& p, int blocks_of_sm, Sifting sifting) {
  Form form{};
  dispatch_element(p.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (p.dim == 64) form = form_of<T, 64>(blocks_of_sm, sifting);
      if (p.dim == 128) form = form_of<T, 128>(blocks_of_sm, sifting);
      if (p.dim == 256) form = form_of<T, 256>(blocks_of_sm, sifting);
    }
    return cudaSuccess;
  });
  return form;
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

cudaError_t plan_form(const SparseDecodeParams& p, int blocks_of_sm, Sifting sifting,
                      SparseDecodePlan& plan) {
  const Form form = form_for(p.decode, blocks_of_sm, sifting);
  if (!form.kernel) return cudaErrorNotSupported;
  const bool sieves = form.sifting != Sifting::kNone;
  Residency residency;
  if (const cudaError_t error = find_residency(form.kernel, kSelectThreads, form.blocks_of_sm,
                                               form.near_bytes, residency)) {
    return error;
  }
  plan.blocks_of_sm = form.blocks_of_sm;
  plan.select =
      plan_teams(p.select, residency.blocks, residency.shared_bytes, listed_members(p), sieves);
  plan.select.shared_bytes = std::max<size_t>(plan.select.shared_bytes, form.near_bytes);
  if (sieves) {
    plan.select.scores_in_shared = false;
    plan.select.shared_bytes = residency.shared_bytes;
  }
  if (form.sifting == Sifting::kShared) {
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
  const int blocks = wants_two_blocks(params, sm_count) ? 2 : 1;
  cudaError_t error = plan_form(params, blocks, Sifting::kNone, plan);
  if (error == cudaSuccess && blocks == 2) {
    const SelectPlan sieving =
        plan_teams(params.select, plan.select.blocks, 0, listed_members(params), true);
    if (may_sift(params.select, sieving) && sieving.time < plan.select.time) {
      const bool shares = shared_scan_blocks(params.select, sieving) > 0;
      if (shares) error = plan_form(params, 2, Sifting::kShared, plan);
      if (!shares || sifting_of(plan.select) != Sifting::kShared) {
        error = plan_form(params, 2, Sifting::kAlone, plan);
      }
    }
  }
  // Where shared memory is small, the other shape may still fit.
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    error = plan_form(params, 2, Sifting::kNone, plan);
  }
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
  const Form form = form_for(p.decode, plan.blocks_of_sm, sifting_of(plan.select));
  if (!form.kernel) return cudaErrorNotSupported;
  void* arguments[] = {&p, &sets, &keys, &w};
  return cudaLaunchCooperativeKernel(form.kernel, dim3(plan.select.blocks), dim3(kSelectThreads),
                                     arguments, plan.select.shared_bytes, stream);
}

}  // namespace rtpurbo::cuda
