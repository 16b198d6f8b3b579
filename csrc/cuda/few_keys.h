#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/decode.h"

namespace rtpurbo::cuda {

/// Query heads next to each other that read the same KV head.
struct FewKeysSet {
  static constexpr int kMaxHeads = 8;
  static_assert(DecodeParams::kMaxHeads - 1 <= UINT8_MAX, "numbers of heads");
  uint8_t first_head = 0, heads_count = 0;
  uint8_t kv_head = 0;      // of the tensor that is read
  bool from_local = false;  // reads the rings
};

struct FewKeysParams {
  HeadsView q, k, v, k_local, v_local, out;
  float* lse_ptr;            // [B, heads]
  const int64_t* start_ptr;  // [B] or null
  int heads, length, slots;
  float scale;
  int sets_count = 0;
  FewKeysSet sets[DecodeParams::kMaxHeads] = {};
};

/// A decode step in which every head sees every key, of which there are few.
struct FewKeysStep {
  FewKeysParams params;
  ElementType type;
  int dim, warps;
  unsigned batch;
};

/// Whether launch_few_keys takes a step, and quicker than launch_decode; `step` is what it takes.
bool plan_few_keys(const DecodeParams& params, int sm_count, FewKeysStep& step);

/// A block for each set and sequence; there is nothing to merge.
cudaError_t launch_few_keys(const FewKeysStep& step, cudaStream_t stream);

}  // namespace rtpurbo::cuda
