#include "csrc/cpu/attention.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <limits>

#include "csrc/cpu/attention_mask.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/softmax.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kTileRows = 256;  // query rows of all heads of a tile together
constexpr int64_t kTileKeys = 256;
constexpr int64_t kPadding = 32;  // tiles are padded to multiples, for few gemm shapes

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Query rows [begin, end) of one head set of one sequence.
struct Tile {
  int64_t batch;
  const HeadSet* set;
  int64_t begin;
  int64_t end;
};

std::vector<Tile> make_tiles(const AttentionParams& params) {
  std::vector<Tile> tiles;
  const auto add = [&](bool near) {
    for (int64_t b = 0; b < params.batch; ++b) {
      for (const HeadSet& set : *params.head_sets) {
        if ((set.keys == KeySet::kNear) != near) continue;
        const int64_t heads = static_cast<int64_t>(set.heads.size());
        int64_t height = std::max(int64_t{16}, kTileRows / heads / 16 * 16);
        if (set.keys == KeySet::kListed) height = std::min(height, params.tile);
        const int64_t group = set.keys == KeySet::kListed ? params.tile : height;
        for (int64_t top = (params.rows - 1) / group * group; top >= 0; top -= group) {
          const int64_t bottom = std::min(top + group, params.rows);
          for (int64_t begin = top; begin < bottom; begin += height) {
            tiles.push_back({b, &set, begin, std::min(begin + height, bottom)});
          }
        }
      }
    }
  };
  add(false);  // the long ones first, so that threads finish together
  add(true);
  return tiles;
}

/// Attention of one tile at a time, S elements in memory and T operands in the products.
template <typename S, typename T>
class TileWorker {
  using Accum = at::opmath_type<S>;

 public:
  explicit TileWorker(const AttentionParams& params) : p_(params), with_values_(params.out.ptr) {
    int64_t heads = 1;
    for (const HeadSet& set : *params.head_sets) {
      heads = std::max(heads, static_cast<int64_t>(set.heads.size()));
    }
    const int64_t rows = std::max(kTileRows, round_up(16 * heads, kPadding));
    queries_.resize(rows * p_.dim);
    keys_.resize(kTileKeys * p_.dim);
    staging_.resize(16 * p_.dim);
    scores_.resize(rows * kTileKeys);
    row_max_.resize(rows);
    row_sum_.resize(rows);
    positions_.resize(kTileKeys);
    if (with_values_) {
      values_.resize(kTileKeys * p_.dim);
      out_.resize(rows * p_.dim);
      if constexpr (!std::is_same_v<T, Accum>) weights_.resize(rows * kTileKeys);
    }
  }

  void run(const Tile& tile) {
    load_queries(tile);
    std::fill(row_max_.begin(), row_max_.end(), -std::numeric_limits<Accum>::infinity());
    std::fill(row_sum_.begin(), row_sum_.end(), Accum(0));
    find_runs(tile);
    bool first = true;
    for (size_t next = 0, offset = 0; next < runs_.size(); first = false) {
      gather_keys(next, offset);
      attend(first);
    }
    store(tile);
  }

 private:
  /// Part of a run in the current key block: columns [column, column + count) are keys from n on.
  struct Piece {
    int64_t column;
    int64_t count;
    int64_t n;
    const Run* run;
  };

  void load_queries(const Tile& tile) {
    height_ = tile.end - tile.begin;
    rows_ = height_ * static_cast<int64_t>(tile.set->heads.size());
    padded_rows_ = round_up(rows_, kPadding);
    T* packed = queries_.data();
    for (const int64_t head : tile.set->heads) {
      const S* row = static_cast<const S*>(p_.q.ptr) + tile.batch * p_.q.batch_stride +
                     head * p_.q.head_stride + tile.begin * p_.q.row_stride;
      for (int64_t i = 0; i < height_; ++i, row += p_.q.row_stride, packed += p_.dim) {
        copy_row(row, packed, p_.dim);
      }
    }
    std::fill(packed, queries_.data() + padded_rows_ * p_.dim, T(0));
  }

  void find_runs(const Tile& tile) {
    const HeadSet& set = *tile.set;
    const int64_t shift = (set.from_local ? p_.local_keys : p_.keys) - p_.rows;
    first_m_ = tile.begin + shift;
    const int64_t last_m = tile.end - 1 + shift;
    const int64_t* starts = set.from_local ? p_.start_local_ptr : p_.start_ptr;
    const int64_t start = starts ? std::max<int64_t>(0, starts[tile.batch]) : 0;
    if (set.keys == KeySet::kNear) {
      near_runs(first_m_, last_m, start, p_.window, p_.sinks, runs_);
    } else {
      int64_t listed = -1;
      int64_t list = 0;
      if (set.keys == KeySet::kListed) {
        list = (tile.batch * p_.lists + set.list) * p_.tiles + tile.begin / p_.tile;
        listed = std::min<int64_t>(p_.block_counts_ptr[list], p_.capacity);
      }
      if (listed < 0) {
        visible_runs(last_m, start, runs_);
      } else {
        block_runs(p_.block_indices_ptr + list * p_.capacity, listed, p_.block_size, last_m, start,
                   runs_);
      }
    }
    const HeadsView& k = set.from_local ? p_.k_local : p_.k;
    const HeadsView& v = set.from_local ? p_.v_local : p_.v;
    k_row_stride_ = k.row_stride;
    v_row_stride_ = v.row_stride;
    k_head_ =
        static_cast<const S*>(k.ptr) + tile.batch * k.batch_stride + set.kv_head * k.head_stride;
    v_head_ =
        static_cast<const S*>(v.ptr) + tile.batch * v.batch_stride + set.kv_head * v.head_stride;
  }

  /// Packs the next kTileKeys keys, from `offset` keys into run `next` on.
  void gather_keys(size_t& next, size_t& offset) {
    pieces_.clear();
    columns_ = 0;
    while (next < runs_.size() && columns_ < kTileKeys) {
      const Run& run = runs_[next];
      const int64_t n = run.begin + static_cast<int64_t>(offset);
      const int64_t count = std::min(kTileKeys - columns_, run.end - n);
      pieces_.push_back({columns_, count, n, &run});
      for (int64_t i = 0; i < count; ++i) positions_[columns_ + i] = n + i;
      columns_ += count;
      offset += count;
      if (n + count == run.end) {
        ++next;
        offset = 0;
      }
    }
    padded_columns_ = round_up(columns_, kPadding);
    pack_transposed([&](int64_t i) { return k_head_ + positions_[i] * k_row_stride_; }, columns_,
                    p_.dim, keys_.data(), kTileKeys, staging_.data());
    if (with_values_) {
      pack_rows([&](int64_t i) { return v_head_ + positions_[i] * v_row_stride_; }, columns_,
                padded_columns_, p_.dim, values_.data());
    }
  }

  void attend(bool first) {
    gemm<T>(padded_rows_, padded_columns_, p_.dim, queries_.data(), p_.dim, keys_.data(), kTileKeys,
            scores_.data(), kTileKeys, false);
    for (int64_t row = 0; row < rows_; ++row) {
      Accum* scores = scores_.data() + row * kTileKeys;
      mask_row(first_m_ + row % height_, scores);
      const Accum old_max = row_max_[row];
      const Accum decay = softmax_row(scores, padded_columns_, static_cast<Accum>(p_.scale),
                                      row_max_[row], row_sum_[row], weights(row));
      if (with_values_ && !first && row_max_[row] != old_max) {
        scale_row(out_.data() + row * p_.dim, decay, out_.data() + row * p_.dim, p_.dim);
      }
    }
    if (with_values_) {
      gemm<T>(padded_rows_, p_.dim, padded_columns_, weights(0), kTileKeys, values_.data(), p_.dim,
              out_.data(), p_.dim, !first);
    }
  }

  /// -inf in the columns that the row at position m does not see.
  void mask_row(int64_t m, Accum* scores) const {
    constexpr Accum kHidden = -std::numeric_limits<Accum>::infinity();
    for (const Piece& piece : pieces_) {
      const int64_t first =
          std::clamp(piece.run->first(m, p_.window) - piece.n, int64_t{0}, piece.count);
      const int64_t last = std::clamp(piece.run->last(m) - piece.n, first, piece.count);
      Accum* part = scores + piece.column;
      std::fill(part, part + first, kHidden);
      std::fill(part + last, part + piece.count, kHidden);
    }
    std::fill(scores + columns_, scores + padded_columns_, kHidden);
  }

  T* weights(int64_t row) {
    if constexpr (std::is_same_v<T, Accum>) {
      return scores_.data() + row * kTileKeys;
    } else {
      return with_values_ ? weights_.data() + row * kTileKeys : nullptr;
    }
  }

  void store(const Tile& tile) {
    auto* lse = static_cast<Accum*>(p_.lse_ptr);
    for (size_t j = 0; j < tile.set->heads.size(); ++j) {
      const int64_t first_row = static_cast<int64_t>(j) * height_;
      Accum* lse_row =
          lse + (tile.batch * p_.lse_heads + tile.set->lse_heads[j]) * p_.rows + tile.begin;
      for (int64_t i = 0; i < height_; ++i) {
        lse_row[i] = row_max_[first_row + i] * static_cast<Accum>(p_.scale) +
                     std::log(row_sum_[first_row + i]);
      }
      if (!with_values_) continue;
      S* out = static_cast<S*>(p_.out.ptr) + tile.batch * p_.out.batch_stride +
               tile.set->heads[j] * p_.out.head_stride + tile.begin * p_.out.row_stride;
      for (int64_t i = 0; i < height_; ++i, out += p_.out.row_stride) {
        const Accum sum = row_sum_[first_row + i];
        if (sum == Accum(0)) {
          std::fill(out, out + p_.dim, S(0));
        } else {
          scale_row(out_.data() + (first_row + i) * p_.dim, Accum(1) / sum, out, p_.dim);
        }
      }
    }
  }

  const AttentionParams& p_;
  const bool with_values_;
  std::vector<T> queries_, keys_, values_, staging_, weights_;
  std::vector<Accum> scores_, out_, row_max_, row_sum_;
  std::vector<int64_t> positions_;
  std::vector<Run> runs_;
  std::vector<Piece> pieces_;
  const S* k_head_ = nullptr;
  const S* v_head_ = nullptr;
  int64_t k_row_stride_ = 0, v_row_stride_ = 0;
  int64_t height_ = 0, rows_ = 0, padded_rows_ = 0, columns_ = 0, padded_columns_ = 0, first_m_ = 0;
};

template <typename S, typename T>
void attend_tiles(const AttentionParams& params) {
  const std::vector<Tile> tiles = make_tiles(params);
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    TileWorker<S, T> worker(params);
    for (size_t i = next++; i < tiles.size(); i = next++) worker.run(tiles[i]);
    gemm_release<T>();
  });
}

}  // namespace

void attention_kernel(const AttentionParams& params) {
  if (params.dtype == at::kBFloat16 && has_brgemm<at::BFloat16>()) {
    return attend_tiles<at::BFloat16, at::BFloat16>(params);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, params.dtype, "attention", [&] {
    attend_tiles<scalar_t, at::opmath_type<scalar_t>>(params);
  });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
