#pragma once
// What the stages share: the tiles in work, which keys their rows see, and the workspace.

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/cuda/select_tiles.h"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda::tiles {

constexpr int kQuad = 4;  // blocks whose fp16 masses lie together

/// Dimensions of the index that the tensor-core paths take, and what makes a log2-mass of q . k.
constexpr int kDim = 16;
constexpr float kLog2OfDot = kLog2E / 4.0f;
constexpr int kBlock = 64;  // the keys of a block that they take

/// Log-masses are to base 2. They are kept for the tiles [first_tile, first_tile + tiles) of each
/// of the sequence-head pairs [first_pair, first_pair + pairs); such a tile is a slot.
struct Workspace {
  void* masses;     // of a row's far keys in a block: float [slots, blocks, height], or __half
                    // [slots, quads, height, kQuad] of largest q . k
  float2* far;      // [slots, chunks, height], Log2Sum of those of a chunk
  float2* near;     // [slots, chunks, height], in form `full` that of the near keys
  float* totals;    // [slots, height], of all keys; +inf where no row is
  float* near_lse;  // [slots, height], of the near keys
  float* weights;   // [slots, blocks], mean shares of the blocks that hold far keys
  int64_t first_pair, first_tile;
  int64_t pairs, tiles;
  int64_t blocks, quads;
  int64_t chunk_blocks, chunks;  // a chunk is what a thread block scores
  int64_t height;                // of a tile, rounded up to whole warps
  bool halves;                   // masses are __half

  __device__ int64_t row(int64_t slot, int64_t i) const { return slot * height + i; }
  __device__ int64_t part(int64_t slot, int64_t chunk, int64_t i) const {
    return (slot * chunks + chunk) * height + i;
  }
  __device__ float& mass(int64_t slot, int64_t block, int64_t i) const {
    return static_cast<float*>(masses)[(slot * blocks + block) * height + i];
  }
  __device__ uint2& quad(int64_t slot, int64_t number, int64_t i) const {
    return static_cast<uint2*>(masses)[(slot * quads + number) * height + i];
  }
};

/// Integers [begin, end).
struct Range {
  int begin, end;
  __device__ bool has(int i) const { return i >= begin && i < end; }
};

/// A tile of query rows, counted from its first one. Only rows [first, last] see a key.
struct Tile {
  int64_t batch, head, number;
  int first, last;
  int position;   // of row 0
  int start;      // first real key
  int far_begin;  // behind the sinks
  int window, block_size;

  __device__ bool empty() const { return first > last; }
  __device__ bool has(int i) const { return i >= first && i <= last; }
  __device__ int rows() const { return last - first + 1; }
  /// End of a row's far keys; at or before far_begin where it has none.
  __device__ int far_end(int i) const { return position + i - window + 1; }
  /// Keys that a row sees end here.
  __device__ int end(int i) const { return position + i + 1; }

  __device__ Range visible_blocks() const {
    return {start / block_size, (end(last) - 1) / block_size + 1};
  }
  __device__ Range far_blocks() const {
    const int first_block = far_begin / block_size;
    if (far_end(last) <= far_begin) return {first_block, first_block};
    return {first_block, (far_end(last) - 1) / block_size + 1};
  }
  /// Blocks that may stay out: those between the last with a sink and the first of a window.
  __device__ Range candidates() const {
    const int sinks_end = min(far_begin, end(last));
    const int begin = sinks_end > start ? (sinks_end - 1) / block_size + 1 : start / block_size;
    return {begin, max(begin, max(start, far_end(first)) / block_size)};
  }
};

__device__ __forceinline__ Tile tile_of(const SelectTilesParams& p, const Workspace& w,
                                        int64_t slot) {
  Tile t;
  // 32 bits divide without a subroutine.
  const auto tiles = static_cast<uint32_t>(w.tiles), heads = static_cast<uint32_t>(p.heads);
  const uint32_t pair = static_cast<uint32_t>(w.first_pair) + static_cast<uint32_t>(slot) / tiles;
  t.batch = pair / heads;
  t.head = pair % heads;
  t.number = w.first_tile + static_cast<uint32_t>(slot) % tiles;
  const int64_t row = t.number * p.tile;
  const int64_t position = p.keys - p.rows + row;
  const int64_t start = p.start_ptr ? min(max(p.start_ptr[t.batch], int64_t{0}), p.keys) : 0;
  t.position = static_cast<int>(position);
  t.start = static_cast<int>(start);
  t.far_begin = static_cast<int>(min(start + p.sinks, p.keys));
  t.window = static_cast<int>(p.window);
  t.block_size = static_cast<int>(p.block_size);
  t.first = static_cast<int>(min(max(int64_t{0}, start - position), p.tile));
  t.last = static_cast<int>(min(p.tile, p.rows - row)) - 1;
  return t;
}

/// Blocks whose keys are scored.
__device__ __forceinline__ Range scored_blocks(const SelectTilesParams& p, const Tile& tile) {
  return p.near_lse_ptr ? tile.far_blocks() : tile.visible_blocks();
}

/// log2 of a sum of powers of 2, kept as the largest exponent and the sum relative to it. NaN and
/// +inf make it NaN.
struct Log2Sum {
  float top = -INFINITY;
  float sum = 0.0f;

  __device__ void add(const Log2Sum& other) {
    const float larger = fmaxf(top, other.top);
    const float shift = softmax_shift(larger);
    sum = sum * fast_exp2(top - shift) + other.sum * fast_exp2(other.top - shift);
    top = larger;
  }
  __device__ void add(float exponent) { add({exponent, 1.0f}); }
  /// Makes it the power of 2 with the largest exponent so far.
  __device__ void keep_largest(float exponent) {
    if (exponent == -INFINITY) return;
    const bool bad = sum != sum || exponent - exponent != 0.0f;
    top = fmaxf(top, exponent);
    sum = bad ? NAN : 1.0f;
  }
  __device__ float value() const { return softmax_shift(top) + __log2f(sum); }
};

}  // namespace rtpurbo::cuda::tiles
