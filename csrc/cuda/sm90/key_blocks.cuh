#pragma once
// The keys that a row tile sees, as blocks that one step multiplies. Near, dense and listed heads
// differ only here: the steps ask for the keys of the i-th block and whether some must be masked.

#include <cstdint>

#include "csrc/cuda/attention.h"
#include "csrc/cuda/attention_tile.cuh"
#include "csrc/cuda/sm90/tensor_map.h"
#include "csrc/cuda/sm90/work_queue.h"

namespace rtpurbo::cuda::sm90 {

/// Begin of a box without keys: beyond every tensor, and after every row.
inline constexpr int kNoKeys = (1 << 30) + 256;

/// Boxes of 64 keys side by side, and which of them the row at position m sees.
template <int kBoxes>
struct KeyBlock {
  int begin[kBoxes];
  int floor;
  int ceiling;
  int window;

  __device__ int first_seen(int m) const { return max(floor, m - window + 1); }
  __device__ int last_seen(int m) const { return min(m, ceiling); }
};

/// The masked blocks come first, in whatever order; so the steps on all others need no mask.
template <int kKeys>
struct KeyBlocks {
  static constexpr int kBoxes = kKeys / kBoxRows;
  static constexpr int kDiagonal = kTileRows / kKeys;  // blocks that hold the tile's own positions

  int masked;
  int total;
  int start;
  // Without a list: blocks down from the end of the tile, then those of sinks up from the start.
  int end;  // position behind the tile's last row
  int window;
  int window_begin;  // first key of the window of the first row
  int window_blocks;
  int left_blocks;  // from this one on they cross the left edge
  int sink_end;
  int sink_blocks;
  int full_sink_blocks;
  // With a list: its members from the last one down, filled up in front to whole blocks.
  const int32_t* list;  // or null
  int members;
  int filling;
  int front;  // masked blocks at the diagonal; then perhaps the one that holds `start`
  int all;    // the whole list's blocks: found out of `members`, ptxas serialises products (C7511)

  __device__ KeyBlock<kBoxes> at(int i) const { return list ? listed(i) : run(i); }

  /// Keeps what belongs to one of several parts: the first one has the masked blocks.
  __device__ void take_part(int part, int parts) {
    const int full = total - masked;
    const int of_first = min(max((total + parts - 1) / parts - masked, 0), full);
    const auto before = [&](int p) { return of_first + (full - of_first) * (p - 1) / (parts - 1); };
    if (part == 0) {
      total = masked + of_first;
    } else {
      const int skipped = before(part);
      total = before(part + 1) - skipped;
      skip(skipped);
    }
  }

 private:
  /// Forgets the masked blocks and the next `count`.
  __device__ void skip(int count) {
    if (list) {
      members += filling - (front + count) * kBoxes;
      filling = front = 0;
    } else {
      const int diagonal = min(window_blocks, kDiagonal);
      const int inner = left_blocks - diagonal, of_window = min(count, inner);
      end -= kKeys * (diagonal + of_window);
      left_blocks = inner - of_window;
      window_blocks = 0;
      start += kKeys * (count - of_window);
    }
    masked = 0;
  }

  __device__ KeyBlock<kBoxes> run(int i) const {
    const int diagonal = min(window_blocks, kDiagonal);
    const int left = window_blocks - left_blocks;
    const int inner = left_blocks - diagonal;
    int down;  // number of a window block, or -1 - that of a sink block
    if (i < diagonal) {
      down = i;
    } else if (i < diagonal + left) {
      down = left_blocks + i - diagonal;
    } else if (i < masked) {
      down = -1 - (full_sink_blocks + i - diagonal - left);
    } else if (i < masked + inner) {
      down = diagonal + i - masked;
    } else {
      down = -1 - (i - masked - inner);
    }
    const bool in_window = down >= 0;
    const int begin = in_window ? end - kKeys * (down + 1) : start + kKeys * (-1 - down);
    KeyBlock<kBoxes> block{.floor = in_window ? window_begin : start,
                           .ceiling = in_window ? INT_MAX : sink_end - 1,
                           .window = in_window ? window : kNoKeys};
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) block.begin[box] = begin + box * kBoxRows;
    return block;
  }

  __device__ KeyBlock<kBoxes> listed(int i) const {
    const int group = i < front ? i : i < masked ? all - 1 : i - (masked - front);
    KeyBlock<kBoxes> block{.floor = start, .ceiling = INT_MAX, .window = kNoKeys};
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const int member = members - 1 - (group * kBoxes + box - filling);
      block.begin[box] = member < members ? list[member] * kBoxRows : kNoKeys;
    }
    return block;
  }
};

/// count_below, at first where most lists answer: all of them, or none.
__device__ inline int count_below_ends(const int32_t* blocks, int count, int64_t block) {
  if (count == 0 || blocks[count - 1] < block) return count;
  if (blocks[0] >= block) return 0;
  return count_below(blocks, count, block);
}

/// Blocks of a tile of kTileRows rows whose first row is at `position`; `height` of them are real.
template <int kKeys>
__device__ void find_key_blocks(const AttentionParams& params, const HeadJob& job, int64_t batch,
                                int64_t tile, int position, int height, KeyBlocks<kKeys>& blocks) {
  using Blocks = KeyBlocks<kKeys>;
  const int length = job.from_local ? params.local_keys : params.keys;
  const int64_t* starts = job.from_local ? params.start_local_ptr : params.start_ptr;
  const int64_t first = starts ? starts[batch] : 0;
  const int last = position + height - 1;

  blocks = {};
  blocks.start = static_cast<int>(first < 0 ? 0 : first < length ? first : length);
  if (blocks.start > last) return;
  if (job.list >= 0) {
    const int64_t place = (batch * params.lists + job.list) * params.tiles + tile;
    const int64_t listed = params.block_counts_ptr[place];
    if (listed >= 0) {
      const int count = static_cast<int>(min(listed, params.capacity));
      const int32_t* list = params.block_indices_ptr + place * params.capacity;
      const int to = count_below_ends(list, count, last / kBoxRows + 1);
      const int from = count_below_ends(list, to, blocks.start / kBoxRows);
      blocks.list = list + from;
      blocks.members = to - from;
      if (blocks.members == 0) return;
      blocks.total = blocks.all = (blocks.members + Blocks::kBoxes - 1) / Blocks::kBoxes;
      blocks.filling = blocks.total * Blocks::kBoxes - blocks.members;
      int hidden = blocks.filling;  // boxes in front that some row does not see whole
      for (int i = blocks.members - 1; i >= 0; --i, ++hidden) {
        if (blocks.list[i] < (position + 1) / kBoxRows) break;
      }
      blocks.front = (hidden + Blocks::kBoxes - 1) / Blocks::kBoxes;
      const bool padded = blocks.list[0] * kBoxRows < blocks.start;
      blocks.masked = blocks.front + (padded && blocks.total > blocks.front);
      return;
    }
  }

  blocks.end = position + kTileRows;
  // Of a near head, too, all rows may see every key before them.
  const bool near = job.near && last + 1 - blocks.start - params.sinks > params.window;
  blocks.window = near ? params.window : kNoKeys;
  const int sinks = near ? params.sinks : 0;
  blocks.sink_end = blocks.start + sinks;
  blocks.sink_blocks = (sinks + kKeys - 1) / kKeys;
  blocks.full_sink_blocks = max(0, min(sinks, position + 1 - blocks.start)) / kKeys;
  blocks.window_begin = max(blocks.sink_end, position - blocks.window + 1);
  if (blocks.window_begin <= last) {
    blocks.window_blocks = (blocks.end - 1 - blocks.window_begin) / kKeys + 1;
    // All rows see a block that begins at `seen` or later, the diagonal aside.
    const int seen = max(blocks.window_begin, blocks.end - blocks.window);
    const int space = blocks.end - seen;
    blocks.left_blocks =
        min(blocks.window_blocks, max(space / kKeys, min(blocks.window_blocks, Blocks::kDiagonal)));
  }
  blocks.total = blocks.window_blocks + blocks.sink_blocks;
  blocks.masked = min(blocks.window_blocks, Blocks::kDiagonal) + blocks.window_blocks -
                  blocks.left_blocks + blocks.sink_blocks - blocks.full_sink_blocks;
}

}  // namespace rtpurbo::cuda::sm90
