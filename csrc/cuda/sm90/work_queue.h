#pragma once
#include <cstdint>

#include "csrc/cuda/attention.h"

namespace rtpurbo::cuda::sm90 {

/// Rows of a query head that a block works on together.
inline constexpr int kTileRows = 128;

/// The order of the row tiles of all heads: those of retrieval heads, then of near ones; by
/// sequence, by section of as many heads as have keys and values that fit in L2 together, the
/// longest first. Where they are few, a tile's keys are split into parts, which are items of their
/// own.
struct WorkQueue {
  struct Role {
    uint32_t first_job;
    uint32_t heads;
    uint32_t section;     // heads of one
    uint32_t parts;       // of a tile
    uint32_t first_part;  // in the scratch, where a tile has several
  };
  struct Tile {
    uint32_t job, batch, number;
  };
  Role retrieval, near;
  uint32_t retrieval_items;
  uint32_t items;
  uint32_t tiles;  // per head

  /// The i-th tile of a role.
  __host__ __device__ Tile tile(const Role& role, uint32_t i) const {
    const uint32_t batch = i / (role.heads * tiles);
    i %= role.heads * tiles;
    const uint32_t first = i / (role.section * tiles) * role.section;
    i %= role.section * tiles;
    const uint32_t left = role.heads - first, heads = role.section < left ? role.section : left;
    return {role.first_job + first + i % heads, batch, tiles - 1 - i / heads};
  }
};

}  // namespace rtpurbo::cuda::sm90
