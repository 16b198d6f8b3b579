#pragma once
// What one thread block of the attention kernels works on: some rows of one query head, and the
// keys that they see as one ascending sequence. Local, dense and listed heads differ only here.

#include <climits>
#include <cstdint>

#include "csrc/cuda/attention.h"
#include "csrc/cuda/head_rows.cuh"

namespace rtpurbo::cuda {

/// Stands for a position that holds no key: no row sees it.
inline constexpr int kNoKey = INT_MAX;

/// How blocks number the tiles: those of retrieval heads first, the last rows first.
struct TileGrid {
  int64_t first;  // of this launch
  int64_t retrieval_items;
  int64_t retrieval_tiles;  // per retrieval head
  int64_t near_tiles;
  int32_t list_rows;  // no tile of a retrieval head crosses a multiple of it
};

/// Rows [row, row + height) of one query head; the first stands at `position`.
struct RowTile {
  int64_t batch;
  HeadJob job;
  int32_t row;
  int32_t height;  // <= 0: nothing to do
  int32_t position;
  int32_t list_tile;
};

template <int kRows>
__device__ RowTile row_tile(const AttentionParams& params, const TileGrid& grid) {
  int64_t item = grid.first + blockIdx.x;
  const bool near = item >= grid.retrieval_items;
  if (near) item -= grid.retrieval_items;
  const int heads = near ? params.heads.near : params.heads.retrieval;
  const int slot = static_cast<int>(item % heads) + (near ? params.heads.retrieval : 0);
  item /= heads;
  const int64_t index = (near ? grid.near_tiles : grid.retrieval_tiles) - 1 - item / params.batch;

  RowTile tile;
  tile.batch = item % params.batch;
  tile.job = params.heads.jobs[slot];
  const int64_t list_rows = near ? kRows : grid.list_rows;
  const int64_t per_list = (list_rows + kRows - 1) / kRows;
  const int64_t list_tile = index / per_list;
  const int64_t row = list_tile * list_rows + index % per_list * kRows;
  int64_t end = row + kRows;
  end = min(end, min((list_tile + 1) * list_rows, static_cast<int64_t>(params.rows)));
  tile.row = static_cast<int32_t>(row);
  tile.height = static_cast<int32_t>(end - row);
  tile.list_tile = static_cast<int32_t>(list_tile);
  tile.position = tile.row + (tile.job.from_local ? params.local_keys : params.keys) - params.rows;
  return tile;
}

/// The keys that some row of a tile sees, ascending: two runs, or the members of some blocks.
struct TileKeys {
  int32_t count;
  int32_t start;          // first real key
  int32_t last;           // position of the tile's last row
  int32_t window;         // key n is hidden from row m when n <= m - window,
  int32_t sink_end;       // unless n < sink_end
  int32_t first_length;   // keys from start on, of the first run
  int32_t second;         // begin of the second run
  const int32_t* blocks;  // or null
  int32_t block_size;
  int32_t skipped;  // keys of the first block before start

  /// Position of the i-th key; kNoKey from `count` on.
  __device__ int position(int i) const {
    if (i >= count) return kNoKey;
    if (!blocks) return i < first_length ? start + i : second + (i - first_length);
    const uint32_t offset = static_cast<uint32_t>(i) + static_cast<uint32_t>(skipped);
    const uint32_t block = offset / static_cast<uint32_t>(block_size);
    const int64_t n = static_cast<int64_t>(blocks[block]) * block_size +
                      (offset - block * static_cast<uint32_t>(block_size));
    return n >= start && n <= last ? static_cast<int>(n) : kNoKey;
  }

  __device__ bool sees(int m, int n) const { return n <= m && (n > m - window || n < sink_end); }
};

/// How many of the ascending blocks are below `block`.
__device__ inline int count_below(const int32_t* blocks, int count, int64_t block) {
  int low = 0;
  while (low < count) {
    const int middle = low + (count - low) / 2;
    if (blocks[middle] < block) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

__device__ inline TileKeys tile_keys(const AttentionParams& params, const RowTile& tile) {
  const HeadJob& job = tile.job;
  const int length = job.from_local ? params.local_keys : params.keys;
  const int64_t* starts = job.from_local ? params.start_local_ptr : params.start_ptr;
  const int64_t start = starts ? starts[tile.batch] : 0;

  TileKeys keys{};
  keys.start = static_cast<int>(start < 0 ? 0 : start < length ? start : length);
  keys.last = tile.position + tile.height - 1;
  keys.window = job.near ? params.window : INT_MAX;
  const int end = keys.last + 1;
  if (job.near) {
    keys.sink_end = keys.start + min(params.sinks, length - keys.start);
    const int first_end = max(keys.start, min(keys.sink_end, end));
    keys.first_length = first_end - keys.start;
    keys.second = max(first_end, tile.position - params.window + 1);
    keys.count = keys.first_length + max(0, end - keys.second);
    return keys;
  }
  keys.first_length = keys.count = max(0, end - keys.start);
  if (job.list < 0) return keys;
  const int64_t list = (tile.batch * params.lists + job.list) * params.tiles + tile.list_tile;
  int64_t count = params.block_counts_ptr[list];
  if (count < 0) return keys;

  count = min(count, params.capacity);
  const int64_t size = params.block_size;
  const int32_t* blocks = params.block_indices_ptr + list * params.capacity;
  const int from = count_below(blocks, static_cast<int>(count), keys.start / size);
  const int to = count_below(blocks, static_cast<int>(count), keys.last / size + 1);
  if (from >= to || keys.count == 0) {
    keys.count = 0;
    return keys;
  }
  keys.blocks = blocks + from;
  keys.block_size = params.block_size;
  keys.skipped = static_cast<int>(max(int64_t{0}, keys.start - blocks[from] * size));
  const int64_t beyond = max(int64_t{0}, (blocks[to - 1] + 1) * size - end);
  const int64_t total = (to - from) * size - keys.skipped - beyond;
  keys.count = static_cast<int>(min(total, static_cast<int64_t>(end)));
  return keys;
}

/// Runs kernel(params, grid) with one block per tile of kRows rows.
template <int kRows, typename Kernel>
cudaError_t launch_tiles(Kernel kernel, const AttentionParams& params, int threads,
                         int shared_bytes, cudaStream_t stream) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  const int64_t rows = params.rows;
  TileGrid grid{};
  grid.list_rows = params.block_indices_ptr ? params.tile : kRows;
  grid.retrieval_tiles = (rows + grid.list_rows - 1) / grid.list_rows *
                         ((static_cast<int64_t>(grid.list_rows) + kRows - 1) / kRows);
  grid.near_tiles = (rows + kRows - 1) / kRows;
  grid.retrieval_items = params.batch * params.heads.retrieval * grid.retrieval_tiles;
  const int64_t items = grid.retrieval_items + params.batch * params.heads.near * grid.near_tiles;
  for (; grid.first < items; grid.first += INT_MAX) {
    const int64_t blocks = items - grid.first < INT_MAX ? items - grid.first : INT_MAX;
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params, grid);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rtpurbo::cuda
