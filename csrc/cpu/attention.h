#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "csrc/cpu/capability.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cpu {

enum class KeySet : uint8_t { kNear, kVisible, kListed };

/// Query heads that read the same KV head under the same mask, so that their rows share one tile.
struct HeadSet {
  KeySet keys;
  bool from_local;                 // reads k_local instead of k
  int64_t kv_head;                 // of the tensor that is read
  int64_t list;                    // kListed: index of its block lists
  std::vector<int64_t> heads;      // query heads
  std::vector<int64_t> lse_heads;  // their places in lse
};

struct AttentionParams {
  c10::ScalarType dtype;
  HeadsView q, k, v, k_local, v_local;
  HeadsView out;             // ptr null: only lse
  void* lse_ptr;             // [B, lse_heads, M] float (double for double q)
  const int64_t* start_ptr;  // [B] or null
  const int64_t* start_local_ptr;
  const int32_t* block_indices_ptr;  // [B, lists, tiles, capacity] contiguous
  const int32_t* block_counts_ptr;   // [B, lists, tiles]
  int64_t batch, rows, keys, local_keys, dim;
  int64_t lse_heads, lists, tiles, capacity, tile, block_size;
  int64_t window, sinks;
  double scale;
  const std::vector<HeadSet>* head_sets;
};

RTPURBO_DECLARE_CPU_KERNEL(attention_kernel, AttentionParams)

}  // namespace rtpurbo::cpu
