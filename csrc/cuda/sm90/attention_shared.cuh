#pragma once
// Sizes, buffers and barriers of an attention block.

#include "csrc/cuda/ptx/mbarrier.cuh"
#include "csrc/cuda/sm90/key_blocks.cuh"

namespace rtpurbo::cuda::sm90 {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups, of 64 rows each
inline constexpr int kConsumerRows = kTileRows / kConsumers;
inline constexpr int kConsumerWarps = kConsumers * 4;

/// Teams of warpgroups with the same rows, each with every kCount-th block of keys, and how they
/// share the 64K registers of a multiprocessor, of which a thread has 168 at the start, or with two
/// teams 96. Heads of 64 columns have short products and as long a softmax as any: it takes two
/// teams to keep the tensor cores busy.
template <int kDim>
struct Teams {
  static constexpr int kCount = 1;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};
template <>
struct Teams<64> {
  static constexpr int kCount = 2;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = 112;
};

template <int kDim>
inline constexpr int kBlockThreads = (1 + Teams<kDim>::kCount * kConsumers) * kWarpgroup;

/// The first block of a team, in the tile at a place: two take turns in storing the rows, which
/// falls to the one that has the second block, and so never the more.
template <int kDim>
__device__ int first_block(int team, int place) {
  return Teams<kDim>::kCount == 1 ? 0 : team ^ place ^ 1;
}

/// Bytes to 16 bytes of a row of a panel, with the 128-byte swizzle.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kBoxColumns * 2 + (chunk ^ row % 8) * 16;
}

/// A row tile of one query head and the keys that it sees, or a part of them.
template <int kKeys>
struct Work {
  HeadJob job;
  int32_t batch;
  int32_t row;
  int32_t height;  // 0: there is no more work
  int32_t position;
  int32_t part;  // its place in the scratch, -1: the tile is not split
  KeyBlocks<kKeys> blocks;
};

/// Keys and values on their way to a team.
template <int kStages, int kStageBytes>
struct StageRing {
  static constexpr int kSize = kStages;
  static constexpr int kBytes = kStageBytes;

  /// Panels of 64 columns of all keys of a block.
  alignas(1024) unsigned char stages[kStages][kStageBytes];
  ptx::Mbarrier full[kStages];
  ptx::Mbarrier empty[kStages];
};

/// What each thread of a warpgroup found for its rows, for the other team that stores them.
template <int kDim, int kTeams>
struct Exchange {};
template <int kDim>
struct Exchange<kDim, 2> {
  float out[kDim / 2][kWarpgroup];
  float maximum[2][kWarpgroup];
  float sum[2][kWarpgroup];
  ptx::Mbarrier full[2];  // by the place of the tile, so that one team arrives and one waits
};

template <int kHeadDim>
struct Shared {
  static constexpr int kDim = kHeadDim;
  static constexpr int kTeams = Teams<kDim>::kCount;
  static constexpr int kKeys = kDim == 128 ? 128 : 64;  // whose scores fit into registers
  static constexpr int kPanels = kDim / kBoxColumns;
  static constexpr int kQueryBytes = kTileRows * kDim * 2;
  // A second tile of queries loads while the first is worked on, where it fits.
  static constexpr int kTiles = kDim <= 128 ? 2 : 1;

  /// Panels of 64 columns of 64 rows, by warpgroup.
  alignas(1024) unsigned char queries[kTiles][kQueryBytes];
  StageRing<kDim == 64 ? 8 : 5, kKeys * kDim * 2> rings[kTeams];
  ptx::Mbarrier queries_full[kTiles];
  ptx::Mbarrier queries_empty[kTiles];
  ptx::Mbarrier work_full[kTiles];  // for the producers of other teams than the first
  Work<kKeys> work[kTiles];
  Exchange<kDim, kTeams> exchange[kConsumers];
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
