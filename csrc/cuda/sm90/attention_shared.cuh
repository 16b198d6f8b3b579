#pragma once
// What the producer and the consumers of an attention block share: sizes, buffers, barriers.

#include "csrc/cuda/ptx/mbarrier.cuh"
#include "csrc/cuda/sm90/key_blocks.cuh"

namespace rtpurbo::cuda::sm90 {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups, of 64 rows each
inline constexpr int kConsumerRows = kTileRows / kConsumers;
inline constexpr int kConsumerWarps = kConsumers * 4;
inline constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
// Of 168 a thread at the start, as 384 threads share 64K registers.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;

/// A row tile of one query head and the keys that it sees.
template <int kKeys>
struct Work {
  HeadJob job;
  int32_t batch;
  int32_t row;
  int32_t height;  // 0: there is no more work
  int32_t position;
  KeyBlocks<kKeys> blocks;
};

template <int kHeadDim>
struct Shared {
  static constexpr int kDim = kHeadDim;
  static constexpr int kKeys = kDim <= 128 ? 128 : 64;
  static constexpr int kPanels = kDim / kBoxColumns;
  static constexpr int kQueryBytes = kTileRows * kDim * 2;
  static constexpr int kStageBytes = kKeys * kDim * 2;
  // A second tile of queries loads while the first is worked on, where it fits.
  static constexpr int kTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kStages = kDim == 64 ? 8 : 5;

  /// Panels of 64 columns; in queries those of 64 rows by warpgroup, in stages those of all keys.
  alignas(1024) unsigned char queries[kTiles][kQueryBytes];
  alignas(1024) unsigned char stages[kStages][kStageBytes];
  ptx::Mbarrier queries_full[kTiles];
  ptx::Mbarrier queries_empty[kTiles];
  ptx::Mbarrier stage_full[kStages];
  ptx::Mbarrier stage_empty[kStages];
  Work<kKeys> work[kTiles];
};

/// A place in a ring of buffers, and the parity of the phase that its barriers are in.
template <int kSize>
struct RingPlace {
  int index = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
