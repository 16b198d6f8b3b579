#include "csrc/cpu/attention.h"

#include <ATen/Dispatch.h>

#include "csrc/cpu/attention_tile.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/jobs.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/softmax.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Attention of one tile at a time, S elements in memory and T operands in the products.
template <typename S, typename T>
class TileWorker {
  using Accum = at::opmath_type<S>;

 public:
  explicit TileWorker(const AttentionParams& params) : p_(params), with_values_(params.out.ptr) {
    const int64_t rows = max_tile_rows(p_);
    queries_.resize(rows * p_.dim);
    keys_.resize(kTileKeys * p_.dim);
    staging_.resize(kPackedGroup * p_.dim);
    scores_.resize(rows * kTileKeys);
    row_max_.resize(rows);
    row_sum_.resize(rows);
    if (with_values_) {
      values_.resize(kTileKeys * p_.dim);
      out_.resize(rows * p_.dim);
      if constexpr (!std::is_same_v<T, Accum>) weights_.resize(rows * kTileKeys);
    }
  }

  void run(const Tile& tile) {
    load_rows<S>(p_.q, tile, p_.dim, queries_);
    std::fill(row_max_.begin(), row_max_.end(), -std::numeric_limits<Accum>::infinity());
    std::fill(row_sum_.begin(), row_sum_.end(), Accum(0));
    tile_runs(p_, tile, 0, std::numeric_limits<int64_t>::max(), runs_);
    blocks_.reset(runs_);
    for (bool first = true; blocks_.next(); first = false) {
      pack_keys_and_values(tile);
      score(tile, first);
      if (with_values_) add_values(tile, first);
    }
    store(tile);
  }

 private:
  void pack_keys_and_values(const Tile& tile) {
    const HeadSet& set = *tile.set;
    const HeadsView& k = set.from_local ? p_.k_local : p_.k;
    const S* keys = head_rows<const S>(k, tile.batch, set.kv_head);
    pack_transposed([&](int64_t i) { return keys + blocks_.position(i) * k.row_stride; },
                    blocks_.columns(), p_.dim, keys_.data(), kTileKeys, staging_.data());
    if (!with_values_) return;
    const HeadsView& v = set.from_local ? p_.v_local : p_.v;
    const S* values = head_rows<const S>(v, tile.batch, set.kv_head);
    const auto value = [&](int64_t i) { return values + blocks_.position(i) * v.row_stride; };
    pack_rows(value, blocks_.columns(), blocks_.padded_columns(), p_.dim, values_.data());
    non_finite_.clear();
    for (int64_t i = 0; i < blocks_.columns(); ++i) {
      if (is_finite(value(i), p_.dim)) continue;
      non_finite_.emplace_back(i, value(i));
      clear_packed_row(values_.data(), i, p_.dim);
    }
  }

  /// Logits, their part of the online softmax, and the decay of what was summed before.
  void score(const Tile& tile, bool first) {
    const int64_t columns = blocks_.padded_columns();
    gemm<T>(round_up(tile.rows(), kTilePadding), columns, p_.dim, queries_.data(), p_.dim,
            keys_.data(), kTileKeys, scores_.data(), kTileKeys, false);
    const int64_t first_m = first_position(p_, tile);
    for (int64_t row = 0; row < tile.rows(); ++row) {
      Accum* scores = scores_.data() + row * kTileKeys;
      blocks_.hide(first_m + row % tile.height(), p_.window, scores);
      const Accum old_max = row_max_[row];
      const Accum decay = softmax_row(scores, columns, static_cast<Accum>(p_.scale), row_max_[row],
                                      row_sum_[row], with_values_ ? weights(row) : nullptr);
      if (with_values_ && !first && row_max_[row] != old_max) {
        scale_row(out_.data() + row * p_.dim, decay, out_.data() + row * p_.dim, p_.dim);
      }
    }
  }

  void add_values(const Tile& tile, bool first) {
    gemm<T>(round_up(tile.rows(), kTilePadding), p_.dim, blocks_.padded_columns(), weights(0),
            kTileKeys, values_.data(), p_.dim, out_.data(), p_.dim, !first);
    // 0 * inf is NaN: values that are not finite reach only the rows that see them.
    const int64_t first_m = first_position(p_, tile);
    for (const auto& [column, value] : non_finite_) {
      for (int64_t row = 0; row < tile.rows(); ++row) {
        if (!blocks_.sees(first_m + row % tile.height(), p_.window, column)) continue;
        const auto weight = static_cast<Accum>(weights(row)[column]);
        Accum* out = out_.data() + row * p_.dim;
        for (int64_t d = 0; d < p_.dim; ++d) out[d] += weight * static_cast<Accum>(value[d]);
      }
    }
  }

  T* weights(int64_t row) {
    if constexpr (std::is_same_v<T, Accum>) {
      return scores_.data() + row * kTileKeys;
    } else {
      return weights_.data() + row * kTileKeys;
    }
  }

  void store(const Tile& tile) {
    auto* lse = static_cast<Accum*>(p_.lse_ptr);
    const Accum scale = static_cast<Accum>(p_.scale);
    int64_t row = 0;
    for (const int64_t place : tile.set->lse_heads) {
      Accum* lse_rows = lse + (tile.batch * p_.lse_heads + place) * p_.rows + tile.begin;
      for (int64_t i = 0; i < tile.height(); ++i, ++row) {
        lse_rows[i] = row_max_[row] * scale + std::log(row_sum_[row]);
      }
    }
    if (!with_values_) return;
    for_each_row<S>(p_.out, tile, [&](S* out, int64_t stacked) {
      const Accum sum = row_sum_[stacked];
      if (sum == Accum(0)) {
        std::fill(out, out + p_.dim, S(0));
      } else {
        scale_row(out_.data() + stacked * p_.dim, Accum(1) / sum, out, p_.dim);
      }
    });
  }

  const AttentionParams& p_;
  const bool with_values_;
  std::vector<T> queries_, keys_, values_, staging_, weights_;
  std::vector<Accum> scores_, out_, row_max_, row_sum_;
  std::vector<std::pair<int64_t, const S*>> non_finite_;
  std::vector<Run> runs_;
  KeyBlocks blocks_;
};

template <typename S, typename T>
void attend_tiles(const AttentionParams& params) {
  const std::vector<Tile> tiles = make_tiles(params);
  run_jobs(tiles.size(), mask_work(params), [&](const auto& next) {
    TileWorker<S, T> worker(params);
    for (int64_t i; (i = next()) >= 0;) worker.run(tiles[i]);
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
