#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

enum class DecodeKeys : uint8_t {
  kNear,     // sinks and window
  kVisible,  // every key
  kListed,   // the far keys of a list; with count -1 every far key
};

/// Query heads that read keys of the same KV head, so that each row is loaded once.
struct DecodeSet {
  static constexpr int kMaxHeads = 8;
  DecodeKeys keys = DecodeKeys::kNear;
  bool from_local = false;   // reads the rings
  bool near_window = false;  // kNear: the retrieval heads' window instead of the local heads'
  uint8_t heads_count = 0;   // at most kMaxHeads
  uint8_t near_heads = 0;    // kVisible: so many of its last heads read only the near keys
  int16_t kv_head = 0;       // of the tensor that is read
  int16_t list = 0;          // kListed
  int16_t first_slot = 0;    // its heads are slot_heads[first_slot, first_slot + heads_count)
};

struct DecodeParams {
  static constexpr int kMaxHeads = 256;
  static constexpr int kHeadSlots = 2;  // a retrieval head has two: near and listed keys
  static constexpr int kMaxSets = kMaxHeads * kHeadSlots;  // a set has a slot at least
  ElementType type;
  HeadsView q, k, v, k_local, v_local, out;
  float* lse_ptr;              // [B, heads]
  const int64_t* start_ptr;    // [B] or null
  const int32_t* indices_ptr;  // [B, lists, capacity]
  const int32_t* counts_ptr;   // [B, lists]
  int64_t batch, heads, length, slots, dim;
  int64_t lists, capacity, block_size;
  int64_t window, near_window, sinks;  // as slots, length at most
  float scale;
  int splits;  // of the keys of each set
  int sets_count = 0, slots_count = 0;
  DecodeSet sets[kMaxSets] = {};
  int16_t slot_heads[kMaxHeads * kHeadSlots] = {};
  int16_t head_slots[kMaxHeads][kHeadSlots] = {};  // -1: none

  /// Whether each head has one part, so that there is nothing to merge.
  __host__ __device__ bool has_whole_heads() const { return splits == 1 && slots_count == heads; }
};

/// Whether positions of keys and the bytes from row to row fit 32 bits.
bool has_short_rows(const DecodeParams& params);

/// Whether the heads of a set share their loads: on the tensor cores of the current device.
bool shares_loads(const DecodeParams& params);

/// Into how many parts the keys of each set are split: for a part there is a tile of keys at least.
int decode_splits(const DecodeParams& params, int sm_count);

/// Bytes of workspace for params.splits splits.
size_t decode_workspace(const DecodeParams& params);

/// Every split of every set attends to its keys, then, unless they are whole, the splits of a head
/// are merged by their log-sum-exp, in fixed order.
cudaError_t launch_decode(const DecodeParams& params, void* workspace, cudaStream_t stream);

}  // namespace rtpurbo::cuda
