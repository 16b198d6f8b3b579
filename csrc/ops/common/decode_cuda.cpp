#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/decode_cuda.h"

#include <algorithm>
#include <vector>

#include "csrc/cuda/limits.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"

namespace rtpurbo::cuda {
namespace {

constexpr size_t kMost = DecodeSet::kMaxHeads;

/// Adds the heads as sets of at most kMost that share every load; the last `near_heads` are so in
/// the last set.
void add_sets(DecodeParams& params, DecodeSet set, at::IntArrayRef heads, size_t near_heads = 0) {
  for (size_t first = 0; first < heads.size(); first += kMost) {
    const auto part = heads.slice(first, std::min(kMost, heads.size() - first));
    set.heads_count = static_cast<uint8_t>(part.size());
    set.near_heads = first + kMost >= heads.size() ? static_cast<uint8_t>(near_heads) : 0;
    set.first_slot = static_cast<int16_t>(params.slots_count);
    params.sets[params.sets_count++] = set;
    for (const int64_t head : part) {
      const auto slot = static_cast<int16_t>(params.slots_count++);
      params.slot_heads[slot] = static_cast<int16_t>(head);
      auto& slots = params.head_slots[head];
      slots[slots[0] < 0 ? 0 : 1] = slot;
    }
  }
}

/// The CPU's sets, with the near keys of listed heads as sets of their own: all heads of a KV head
/// whose windows are equal load them together. Where that spares loads, local heads join a set that
/// reads every key.
void fill_sets(DecodeParams& params, const std::vector<cpu::HeadSet>& sets) {
  for (auto& slots : params.head_slots) std::fill(std::begin(slots), std::end(slots), -1);
  const bool one_window = params.window == params.near_window;
  const bool joins = shares_loads(params);
  for (size_t i = 0; i < sets.size();) {
    const int64_t kv_head = sets[i].kv_head;
    const bool from_local = sets[i].from_local;
    DecodeSet set{.from_local = from_local, .kv_head = static_cast<int16_t>(kv_head)};
    std::vector<int64_t> visible, near, listed_near;
    for (; i < sets.size() && sets[i].kv_head == kv_head && sets[i].from_local == from_local; ++i) {
      const std::vector<int64_t>& heads = sets[i].heads;
      if (sets[i].keys == cpu::KeySet::kVisible) {
        visible.insert(visible.end(), heads.begin(), heads.end());
      } else if (sets[i].keys == cpu::KeySet::kListed) {
        set.keys = DecodeKeys::kListed;
        set.list = static_cast<int16_t>(sets[i].list);
        add_sets(params, set, heads);
        auto& list = one_window ? near : listed_near;
        list.insert(list.end(), heads.begin(), heads.end());
      } else {
        near.insert(near.end(), heads.begin(), heads.end());
      }
    }
    const size_t room = joins ? (kMost - visible.size() % kMost) % kMost : 0;
    const auto joining = static_cast<std::ptrdiff_t>(std::min(room, near.size()));
    visible.insert(visible.end(), near.end() - joining, near.end());
    near.resize(near.size() - joining);
    set.keys = DecodeKeys::kVisible;
    add_sets(params, set, visible, joining);
    set.keys = DecodeKeys::kNear;
    add_sets(params, set, near);
    set.near_window = true;
    add_sets(params, set, listed_near);
  }
  // Blocks start in this order: the short ones at the end fill what the long ones leave idle.
  std::stable_partition(params.sets, params.sets + params.sets_count,
                        [](const DecodeSet& set) { return set.keys != DecodeKeys::kNear; });
}

}  // namespace

DecodeParams decode_params(const char* op, const cpu::DecodeParams& in) {
  check_not_double(op, "q", in.dtype);
  TORCH_CHECK_VALUE(in.heads <= DecodeParams::kMaxHeads && in.dim <= kMaxHeadDim, "rtpurbo::", op,
                    ": q on CUDA must have Hq <= ", DecodeParams::kMaxHeads,
                    " and D <= ", kMaxHeadDim, ", got Hq = ", in.heads, " and D = ", in.dim);
  DecodeParams params{
      .type = element_type(in.dtype),
      .q = in.q,
      .k = in.k,
      .v = in.v,
      .k_local = in.k_local,
      .v_local = in.v_local,
      .out = in.out,
      .lse_ptr = static_cast<float*>(in.lse_ptr),
      .start_ptr = in.start_ptr,
      .indices_ptr = in.indices_ptr,
      .counts_ptr = in.counts_ptr,
      .batch = in.batch,
      .heads = in.heads,
      .length = in.length,
      .slots = in.slots,
      .dim = in.dim,
      .lists = in.lists,
      .capacity = in.capacity,
      .block_size = std::min(in.block_size, std::max<int64_t>(1, in.length)),
      .window = in.window,
      .near_window = in.near_window,
      .sinks = in.sinks,
      .scale = static_cast<float>(in.scale),
      .splits = 1,
  };
  fill_sets(params, *in.head_sets);
  return params;
}

}  // namespace rtpurbo::cuda
#endif
