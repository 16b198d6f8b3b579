#pragma once
// The unit of work of the attention kernels: some query rows of the heads that share keys and mask,
// stacked, against the keys they see, a block at a time.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/cpu/attention.h"
#include "csrc/cpu/attention_mask.h"
#include "csrc/cpu/rows.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

inline constexpr int64_t kTileRows = 256;  // query rows of all heads of a tile together
inline constexpr int64_t kTileKeys = 256;
inline constexpr int64_t kTilePadding = 32;  // sizes are padded to multiples, for few gemm shapes

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Query rows [begin, end) of one head set of one sequence.
struct Tile {
  int64_t batch;
  const HeadSet* set;
  int64_t begin;
  int64_t end;

  int64_t height() const { return end - begin; }
  int64_t rows() const { return height() * static_cast<int64_t>(set->heads.size()); }
};

/// Appends the tiles of one head set, last rows first.
inline void append_tiles(const AttentionParams& params, int64_t batch, const HeadSet& set,
                         std::vector<Tile>& tiles) {
  const bool listed = set.keys == KeySet::kListed;
  const int64_t heads = static_cast<int64_t>(set.heads.size());
  const int64_t most = std::max(int64_t{16}, kTileRows / heads / 16 * 16);
  const int64_t height = listed ? std::min(most, params.tile) : most;
  const int64_t group = listed ? params.tile : height;  // no tile crosses a block list's rows
  for (int64_t top = (params.rows - 1) / group * group; top >= 0 && params.rows > 0; top -= group) {
    const int64_t bottom = std::min(top + group, params.rows);
    for (int64_t begin = top; begin < bottom; begin += height) {
      tiles.push_back({batch, &set, begin, std::min(begin + height, bottom)});
    }
  }
}

/// All tiles, the long ones first, so that threads finish together.
inline std::vector<Tile> make_tiles(const AttentionParams& params) {
  std::vector<Tile> tiles;
  for (const bool near : {false, true}) {
    for (int64_t b = 0; b < params.batch; ++b) {
      for (const HeadSet& set : *params.head_sets) {
        if ((set.keys == KeySet::kNear) == near) append_tiles(params, b, set, tiles);
      }
    }
  }
  return tiles;
}

/// About how many multiply-adds the masks ask for.
inline double mask_work(const AttentionParams& params) {
  double pairs = 0;
  for (const HeadSet& set : *params.head_sets) {
    const int64_t length = set.from_local ? params.local_keys : params.keys;
    const int64_t keys = set.keys == KeySet::kNear
                             ? std::min(length, params.window + params.sinks + params.rows)
                             : length;
    pairs += static_cast<double>(set.heads.size()) * static_cast<double>(keys);
  }
  return 2.0 * pairs * static_cast<double>(params.batch * params.rows * params.dim);
}

/// The most rows that a tile has, padded.
inline int64_t max_tile_rows(const AttentionParams& params) {
  size_t heads = 1;
  for (const HeadSet& set : *params.head_sets) heads = std::max(heads, set.heads.size());
  return std::max(kTileRows, round_up(16 * static_cast<int64_t>(heads), kTilePadding));
}

inline int64_t first_key(const int64_t* starts, int64_t batch) {
  return starts ? std::max<int64_t>(0, starts[batch]) : 0;
}

/// Position of the first row of the tile.
inline int64_t first_position(const AttentionParams& params, const Tile& tile) {
  return tile.begin + (tile.set->from_local ? params.local_keys : params.keys) - params.rows;
}

/// The runs of keys in [key_begin, key_end) that some row of the tile sees.
inline void tile_runs(const AttentionParams& params, const Tile& tile, int64_t key_begin,
                      int64_t key_end, std::vector<Run>& runs) {
  const HeadSet& set = *tile.set;
  const int64_t first = first_position(params, tile);
  const int64_t last = first + tile.height() - 1;
  const int64_t start =
      first_key(set.from_local ? params.start_local_ptr : params.start_ptr, tile.batch);
  runs.clear();
  if (set.keys == KeySet::kNear) {
    near_runs(first, last, start, params.window, params.sinks, runs);
  } else if (set.keys == KeySet::kVisible) {
    visible_runs(last, start, runs);
  } else {
    const int64_t list =
        (tile.batch * params.lists + set.list) * params.tiles + tile.begin / params.tile;
    const int64_t count = std::min<int64_t>(params.block_counts_ptr[list], params.capacity);
    if (count < 0) {
      visible_runs(last, start, runs);
    } else {
      const int32_t* blocks = params.block_indices_ptr + list * params.capacity;
      const int32_t* begin =
          std::lower_bound(blocks, blocks + count, key_begin / params.block_size);
      block_runs(begin, blocks + count - begin, params.block_size, std::min(last, key_end - 1),
                 start, runs);
    }
  }
  size_t kept = 0;
  for (Run run : runs) {
    run.begin = std::max(run.begin, key_begin);
    run.end = std::min(run.end, key_end);
    if (run.begin < run.end) runs[kept++] = run;
  }
  runs.resize(kept);
}

/// The keys of some runs in blocks of up to kTileKeys columns.
class KeyBlocks {
 public:
  /// Columns [column, column + count) hold the keys from n on.
  struct Piece {
    int64_t column;
    int64_t count;
    int64_t n;
    Run run;
  };

  void reset(const std::vector<Run>& runs) {
    runs_ = &runs;
    run_ = 0;
    offset_ = 0;
  }

  /// Moves to the next block; false after the last one.
  bool next() {
    pieces_.clear();
    columns_ = 0;
    while (run_ < runs_->size() && columns_ < kTileKeys) {
      const Run& run = (*runs_)[run_];
      const int64_t n = run.begin + offset_;
      const int64_t count = std::min(kTileKeys - columns_, run.end - n);
      pieces_.push_back({columns_, count, n, run});
      for (int64_t i = 0; i < count; ++i) positions_[columns_ + i] = n + i;
      columns_ += count;
      offset_ += count;
      if (n + count == run.end) {
        ++run_;
        offset_ = 0;
      }
    }
    return columns_ > 0;
  }

  int64_t columns() const { return columns_; }
  int64_t padded_columns() const { return round_up(columns_, kTilePadding); }
  int64_t position(int64_t column) const { return positions_[column]; }

  /// Whether the row at position m sees the key in `column`.
  bool sees(int64_t m, int64_t window, int64_t column) const {
    const int64_t n = positions_[column];
    for (const Piece& piece : pieces_) {
      if (column < piece.column || column >= piece.column + piece.count) continue;
      return piece.run.first(m, window) <= n && n < piece.run.last(m);
    }
    return false;
  }

  /// Writes -inf to the columns that the row at position m does not see.
  template <typename Accum>
  void hide(int64_t m, int64_t window, Accum* scores) const {
    constexpr Accum kHidden = -std::numeric_limits<Accum>::infinity();
    for (const Piece& piece : pieces_) {
      const int64_t first =
          std::clamp(piece.run.first(m, window) - piece.n, int64_t{0}, piece.count);
      const int64_t last = std::clamp(piece.run.last(m) - piece.n, first, piece.count);
      Accum* part = scores + piece.column;
      std::fill(part, part + first, kHidden);
      std::fill(part + last, part + piece.count, kHidden);
    }
    std::fill(scores + columns_, scores + padded_columns(), kHidden);
  }

 private:
  const std::vector<Run>* runs_ = nullptr;
  size_t run_ = 0;
  int64_t offset_ = 0;
  int64_t columns_ = 0;
  std::vector<Piece> pieces_;
  std::array<int64_t, kTileKeys> positions_{};
};

template <typename S>
S* head_rows(const HeadsView& view, int64_t batch, int64_t head) {
  return static_cast<S*>(view.ptr) + batch * view.batch_stride + head * view.head_stride;
}

/// Calls visit(row address, stacked row) for the rows of the tile in `view`.
template <typename S, typename Visit>
void for_each_row(const HeadsView& view, const Tile& tile, const Visit& visit) {
  for (size_t j = 0; j < tile.set->heads.size(); ++j) {
    S* row = head_rows<S>(view, tile.batch, tile.set->heads[j]) + tile.begin * view.row_stride;
    for (int64_t i = 0; i < tile.height(); ++i, row += view.row_stride) {
      visit(row, static_cast<int64_t>(j) * tile.height() + i);
    }
  }
}

/// Stacks the rows of the tile into `packed` [padded rows, dim], zeros below.
template <typename S, typename T>
void load_rows(const HeadsView& view, const Tile& tile, int64_t dim, std::vector<T>& packed) {
  for_each_row<const S>(view, tile, [&](const S* row, int64_t stacked) {
    copy_row(row, packed.data() + stacked * dim, dim);
  });
  const int64_t rows = tile.rows();
  std::fill(packed.data() + rows * dim, packed.data() + round_up(rows, kTilePadding) * dim, T(0));
}

/// The stacked rows' values of an [B, H, M] array.
template <typename Accum>
void load_row_values(const Accum* values, int64_t heads, int64_t rows, const Tile& tile,
                     const std::vector<int64_t>& places, Accum* stacked) {
  for (const int64_t place : places) {
    stacked = std::copy_n(values + (tile.batch * heads + place) * rows + tile.begin, tile.height(),
                          stacked);
  }
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
