#pragma once
// Which keys a set reads: positions j in [0, total) mapped to rows of its tensors.

#include <cuda_runtime.h>

#include "csrc/cuda/decode.h"

namespace rtpurbo::cuda {

/// Keys of one product of the tensor cores, and most of a warp's tile.
constexpr int kProductKeys = 16;
constexpr int kMostTileKeys = 32;

/// Partial results: slot s of split i of batch b stands at (b * splits + i) * slots_count + s.
struct Partials {
  float* sums;    // [B, splits, slots, dim], relative to max
  float2* stats;  // [B, splits, slots], (max of the scaled logits in octaves, sum of weights)
};

/// Position counts keys and rows. Without kAllKinds, of kNear sets alone.
template <typename Position, bool kAllKinds>
class SetKeys {
 public:
  __device__ SetKeys(const DecodeParams& p, const DecodeSet& set, int64_t batch)
      : block_size_(static_cast<int>(p.block_size)) {
    const auto length = static_cast<Position>(p.length);
    const Position start = p.start_ptr ? within(p.start_ptr[batch], length) : 0;
    if (set.from_local) {
      total_ = min(static_cast<Position>(p.slots), length - start);
      sinks_ = total_;
      return;
    }
    if (start >= length) return;
    const bool near_window = set.keys == DecodeKeys::kListed || set.near_window;
    const auto window = static_cast<Position>(near_window ? p.near_window : p.window);
    const Position sinks_end = start + min(static_cast<Position>(p.sinks), length - start);
    const Position window_begin = max(sinks_end, length - window);
    if (set.keys == DecodeKeys::kVisible && set.near_heads == 0) {
      gap_ = start;
      total_ = length - start;
    } else if (set.keys != DecodeKeys::kListed) {
      if (set.keys == DecodeKeys::kVisible) {
        far_begin_ = sinks_end;
        far_end_ = window_begin;
        far_ = (window_begin - sinks_end + kMostTileKeys - 1) / kMostTileKeys * kMostTileKeys;
      }
      gap_ = start;
      sinks_ = far_ + sinks_end - start;
      jump_ = window_begin - sinks_end;
      total_ = sinks_ + length - window_begin;
    } else {
      const int64_t place = batch * p.lists + set.list;
      const int32_t count = p.counts_ptr[place];
      far_begin_ = sinks_end;
      far_end_ = window_begin;
      if (count < 0) {
        gap_ = sinks_end;
        total_ = window_begin - sinks_end;
      } else {
        list_ = p.indices_ptr + place * p.capacity;
        total_ = static_cast<Position>(min(static_cast<int64_t>(count), p.capacity)) * block_size_;
      }
    }
  }

  __device__ Position total() const { return total_; }

  /// Of a set with near_heads: positions before this one, whole tiles, hold the keys that these do
  /// not read.
  __device__ Position far() const { return far_; }

  /// Row of position j < total, or -1: of a listed block's key that is not far, or padding.
  __device__ Position row(Position j) const {
    if (kAllKinds && list_) {
      // In 64 bits: an entry may be anything.
      const int64_t n =
          block_size_ == 1
              ? list_[j]
              : static_cast<int64_t>(list_[j / block_size_]) * block_size_ + j % block_size_;
      return n >= far_begin_ && n < far_end_ ? static_cast<Position>(n) : -1;
    }
    if (kAllKinds && j < far_) return far_begin_ + j < far_end_ ? far_begin_ + j : -1;
    return gap_ + j - (kAllKinds ? far_ : 0) + (j >= sinks_ ? jump_ : 0);
  }

 private:
  /// The value in [0, most].
  static __device__ Position within(int64_t value, Position most) {
    return static_cast<Position>(min(max(value, int64_t{0}), static_cast<int64_t>(most)));
  }

  const int32_t* list_ = nullptr;
  Position total_ = 0;
  Position gap_ = 0;    // row of position 0
  Position sinks_ = 0;  // positions before the jump from sinks to window
  Position jump_ = 0;
  Position far_ = 0;  // positions of far keys, before those of near ones
  Position far_begin_ = 0, far_end_ = 0;
  int block_size_;
};

/// Positions [begin, end) of one split; whole tiles, so that splits differ by at most one.
template <typename Position>
struct Range {
  Position begin, end;
};

template <typename Position>
__device__ __forceinline__ Range<Position> split_range(Position total, int split, int splits,
                                                       int tile) {
  const auto tiles = static_cast<uint32_t>((total + tile - 1) / tile);
  const uint32_t per_split = tiles / static_cast<uint32_t>(splits);
  const uint32_t rest = tiles - per_split * static_cast<uint32_t>(splits);
  const uint32_t own = static_cast<uint32_t>(split);
  const uint32_t first = own * per_split + min(own, rest);
  const uint32_t count = per_split + (own < rest);
  return {min(static_cast<Position>(first) * tile, total),
          min(static_cast<Position>(first + count) * tile, total)};
}

}  // namespace rtpurbo::cuda
