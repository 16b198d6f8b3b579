#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/cuda/limits.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda {

/// A query head, the head of k and v that it reads and which keys of it.
struct HeadJob {
  int32_t head;
  int32_t kv_head;   // of the tensor that is read
  int32_t lse_head;  // its place in lse
  int32_t list;      // its block lists; -1: none
  bool near;         // sees sinks and window only
  bool from_local;   // reads k_local and v_local
};

/// Jobs inside the kernel parameters, so that no copy to the device is needed: first those of
/// retrieval heads, then the near ones.
struct HeadTable {
  static constexpr int kMax = 128;
  int32_t retrieval = 0;
  int32_t near = 0;
  HeadJob jobs[kMax];
};

struct AttentionParams {
  ElementType type;
  HeadsView q, k, v, k_local, v_local;
  HeadsView out;             // ptr null: only lse
  float* lse_ptr;            // [B, lse_heads, M]
  const int64_t* start_ptr;  // [B] or null
  const int64_t* start_local_ptr;
  const int32_t* block_indices_ptr;  // [B, lists, tiles, capacity], or null
  const int32_t* block_counts_ptr;   // [B, lists, tiles]
  int64_t batch, lse_heads, lists, tiles, capacity;
  int32_t rows, keys, local_keys, dim;
  int32_t tile, block_size, window, sinks;
  float scale;
  uint32_t* ticket_ptr = nullptr;  // scratch of the launch; null: only the portable path
  float* parts_ptr = nullptr;      // the same, attention_parts floats; null: no tile is split
  bool vectorized = false;         // 16-byte loads are aligned; the launchers set it
  HeadTable heads;
};

/// Whether all rows that are read begin at multiples of 16 bytes.
bool rows_are_aligned(const AttentionParams& params);

/// Floats of scratch for the results of parts, where row tiles are so few that their keys are split
/// among multiprocessors; else 0.
int64_t attention_parts(const AttentionParams& params);

/// Attention or its log-sum-exp alone; float32, or 16-bit types by tensor cores: those of sm_90a
/// where the device and the parameters allow it, else those of sm_80.
cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
