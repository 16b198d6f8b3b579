#pragma once
#include <cstdint>

#include "csrc/cuda/attention.h"

namespace rtpurbo::cuda::sm90 {

/// Rows of a query head that a block works on together.
inline constexpr int kTileRows = 128;

/// The order of the row tiles of all heads: those of retrieval heads, then of near ones; by
/// sequence, by section of as many heads as have keys and values that fit in L2 together, the
/// longest first.
struct WorkQueue {
  struct Role {
    uint32_t first_job;
    uint32_t heads;
    uint32_t section;  // heads of one
  };
  Role retrieval, near;
  uint32_t retrieval_items;
  uint32_t items;
  uint32_t tiles;  // per head
};

}  // namespace rtpurbo::cuda::sm90
