#include <algorithm>

#include "csrc/cuda/decode/few_keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/few_keys.h"

namespace rtpurbo::cuda {
namespace {

/// Whether the heads of a set read every key that its tensor holds.
bool sees_all(const DecodeParams& p, const DecodeSet& set) {
  if (set.from_local) return true;
  const int64_t window = set.near_window ? p.near_window : p.window;
  const bool near_is_all = window >= p.length - p.sinks;
  return set.keys == DecodeKeys::kVisible ? set.near_heads == 0 || near_is_all
                                          : set.keys == DecodeKeys::kNear && near_is_all;
}

/// By heads in ascending order, in which `p.sets` are not.
void fill_sets(const DecodeParams& p, FewKeysParams& few) {
  FewKeysSet of_head[DecodeParams::kMaxHeads];
  for (const DecodeSet* set = p.sets; set < p.sets + p.sets_count; ++set) {
    for (int i = 0; i < set->heads_count; ++i) {
      const int head = p.slot_heads[set->first_slot + i];
      of_head[head] = {.first_head = static_cast<uint8_t>(head),
                       .heads_count = 1,
                       .kv_head = static_cast<uint8_t>(set->kv_head),
                       .from_local = set->from_local};
    }
  }
  FewKeysSet* last = nullptr;
  for (const FewKeysSet* next = of_head; next < of_head + p.heads; ++next) {
    if (last && last->kv_head == next->kv_head && last->from_local == next->from_local &&
        last->heads_count < FewKeysSet::kMaxHeads) {
      ++last->heads_count;
    } else {
      last = &few.sets[few.sets_count++];
      *last = *next;
    }
  }
}

/// Warps of a block, by times on an H200; 0 where launch_decode is quicker. Blocks of eight warps
/// that read rows of 256 leave no room for a second one on a multiprocessor: where they are more
/// than these, blocks of four read 16 keys a warp again and again.
int warps_for(int64_t keys, int64_t dim, int64_t blocks, int sm_count) {
  const bool waits = blocks > sm_count;
  if (keys <= 4 * kFewKeysOfWarp) return 4;
  if (dim == 256 && waits) return keys <= 32 * kFewKeysOfWarp ? 4 : 0;
  if (keys <= 8 * kFewKeysOfWarp) return 8;
  return keys <= 16 * kFewKeysOfWarp && dim <= 128 && blocks * dim <= 64 * sm_count ? 16 : 0;
}

template <typename T, int kDim, int kWarps, bool kLoops = false>
cudaError_t launch(const FewKeysStep& step, cudaStream_t stream) {
  constexpr int kBytes = sizeof(FewKeysShared<kDim, kWarps>);
  const auto kernel = few_keys_kernel<T, kDim, kWarps, kLoops>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) {
    return error;
  }
  kernel<<<dim3(step.params.sets_count, step.batch), 32 * kWarps, kBytes, stream>>>(step.params);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t launch_dim(const FewKeysStep& step, cudaStream_t stream) {
  const bool loops = step.params.length > step.warps * kFewKeysOfWarp;
  if constexpr (kDim == 256) {
    if (step.warps == 4 && loops) return launch<T, kDim, 4, true>(step, stream);
  } else {
    if (step.warps == 16 && !loops) return launch<T, kDim, 16>(step, stream);
  }
  if (step.warps == 8 && !loops) return launch<T, kDim, 8>(step, stream);
  if (step.warps == 4 && !loops) return launch<T, kDim, 4>(step, stream);
  return cudaErrorNotSupported;
}

}  // namespace

bool plan_few_keys(const DecodeParams& p, int sm_count, FewKeysStep& step) {
  constexpr int64_t kMaxGridY = 65535, kMostKeys = 512;
  if (p.length > kMostKeys || p.batch > kMaxGridY || !shares_loads(p)) return false;
  if (!std::all_of(p.sets, p.sets + p.sets_count,
                   [&](const DecodeSet& set) { return sees_all(p, set); })) {
    return false;
  }
  step = {.params = {.q = p.q,
                     .k = p.k,
                     .v = p.v,
                     .k_local = p.k_local,
                     .v_local = p.v_local,
                     .out = p.out,
                     .lse_ptr = p.lse_ptr,
                     .start_ptr = p.start_ptr,
                     .heads = static_cast<int>(p.heads),
                     .length = static_cast<int>(p.length),
                     .slots = static_cast<int>(p.slots),
                     .scale = p.scale},
          .type = p.type,
          .dim = static_cast<int>(p.dim),
          .warps = 0,
          .batch = static_cast<unsigned>(p.batch)};
  fill_sets(p, step.params);
  step.warps = warps_for(p.length, p.dim, p.batch * step.params.sets_count, sm_count);
  return step.warps > 0;
}

cudaError_t launch_few_keys(const FewKeysStep& step, cudaStream_t stream) {
  return dispatch_element(step.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (step.dim == 64) return launch_dim<T, 64>(step, stream);
      if (step.dim == 128) return launch_dim<T, 128>(step, stream);
      if (step.dim == 256) return launch_dim<T, 256>(step, stream);
    }
    return cudaErrorNotSupported;
  });
}

}  // namespace rtpurbo::cuda
