#pragma once
// How the work is cut up. A thread block scores a band of four tiles, one for each of its
// warpgroups, against a chunk of keys; they go through the keys in stages of 512, which all share.

#include "csrc/cuda/select_tiles/problem.cuh"

namespace rtpurbo::cuda::sm90::maxima {

using tiles::Range;
using tiles::Tile;
using tiles::Workspace;

constexpr int kWarpgroups = 4;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kRows = 128;      // of a tile
constexpr int kTileKeys = 256;  // whose maxima a quad's lanes share out: two products' keys
constexpr int kStageKeys = 2 * kTileKeys;
constexpr int kKeyBytes = 32;
constexpr int kTileBytes = kTileKeys * kKeyBytes;
constexpr int kBoxBlocks = 2;  // of a copy, and of a product
constexpr int kBoxKeys = kBoxBlocks * tiles::kBlock;
constexpr int kBoxBytes = kBoxKeys * kKeyBytes;

/// Of a launch. Numbers of 32 bits divide without a subroutine.
struct Plan {
  int chunks, bands, tiles;  // bands and tiles of a pair
  int64_t items;

  __host__ explicit Plan(const Workspace& w)
      : chunks(static_cast<int>(w.chunks)),
        bands(static_cast<int>((w.tiles + kWarpgroups - 1) / kWarpgroups)),
        tiles(static_cast<int>(w.tiles)),
        items(w.pairs * bands * chunks) {}
};

struct Item {
  int pair, band, chunk;
};

__device__ __forceinline__ Item item_of(const Plan& plan, unsigned index) {
  const int row = static_cast<int>(index / plan.chunks);
  return {row / plan.bands, row % plan.bands, static_cast<int>(index % plan.chunks)};
}

/// What a warpgroup scores.
struct Group {
  int slot;
  bool exists;
  Tile tile;

  __device__ bool empty() const { return !exists || tile.empty(); }
  /// Keys that one of its rows sees as far.
  __device__ Range far() const {
    return empty() ? Range{0, 0} : Range{tile.far_begin, tile.far_end(tile.last)};
  }
  /// End of the keys behind the sinks that all its rows see as far; 0 when some row sees none.
  __device__ int common_end() const {
    return !empty() && tile.rows() == kRows ? tile.far_end(0) : 0;
  }
};

__device__ __forceinline__ Group group_of(const SelectTilesParams& p, const Workspace& w,
                                          const Plan& plan, const Item& item, int number) {
  const int index = item.band * kWarpgroups + number;
  Group g;
  g.exists = index < plan.tiles;
  g.slot = g.exists ? item.pair * plan.tiles + index : 0;
  if (g.exists) g.tile = tile_of(p, w, g.slot);
  return g;
}

/// Stages, counted from key 0, with a far key of any row of the item.
__device__ __forceinline__ Range stages_of(const SelectTilesParams& p, const Workspace& w,
                                           const Plan& plan, const Item& item) {
  const int64_t chunk_keys = w.chunk_blocks * tiles::kBlock;
  int64_t begin = (item.chunk + 1) * chunk_keys, end = item.chunk * chunk_keys;
  const int64_t chunk_begin = end, chunk_end = begin;
  for (int i = 0; i < kWarpgroups; ++i) {
    const Range far = group_of(p, w, plan, item, i).far();
    if (far.end <= far.begin) continue;
    begin = min(begin, max(chunk_begin, static_cast<int64_t>(far.begin)));
    end = max(end, min(chunk_end, static_cast<int64_t>(far.end)));
  }
  if (end <= begin) return {0, 0};
  return {static_cast<int>(begin / kStageKeys), static_cast<int>((end - 1) / kStageKeys) + 1};
}

}  // namespace rtpurbo::cuda::sm90::maxima
