#include "csrc/cpu/select_tiles.h"

#include <ATen/Parallel.h>

#include <vector>

#include "csrc/cpu/index_scores.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Keys [begin, end).
struct Range {
  int64_t begin, end;
};

template <typename Accum>
class TileSelector {
 public:
  explicit TileSelector(const SelectTilesParams& params)
      : p_(params),
        in_(params.index),
        blocks_((in_.keys + in_.block_size - 1) / in_.block_size),
        scores_(in_.dim, in_.keys),
        masses_(blocks_),
        weights_(blocks_),
        forced_(blocks_) {}

  void run(int64_t batch, int64_t head, int64_t tile) {
    const int64_t place = (batch * in_.heads + head) * p_.tiles + tile;
    int32_t* indices = p_.indices_ptr + place * p_.capacity;
    std::fill(indices, indices + p_.capacity, -1);
    auto& mass = static_cast<Accum*>(p_.mass_ptr)[place];
    const int64_t shift = in_.keys - in_.rows;
    const int64_t start = first_key(in_, batch);
    const int64_t first = std::max(tile * p_.tile, start - shift);
    const int64_t last = std::min((tile + 1) * p_.tile, in_.rows) - 1;
    if (first > last) {
      p_.counts_ptr[place] = 0;
      mass = Accum(1);
      return;
    }
    const Range visible{start, last + shift + 1};
    const double near_share = pool_shares(batch, head, first, last, visible);
    const Range sinks{start, std::min(start + in_.sinks, visible.end)};
    const Range window{std::max(start, first + shift - in_.window + 1), visible.end};
    choose(head, near_share, visible, sinks, window);
    const auto count = static_cast<int64_t>(chosen_.size());
    mass = static_cast<Accum>(share_);
    p_.counts_ptr[place] = count <= p_.capacity ? static_cast<int32_t>(count) : -1;
    if (count <= p_.capacity) std::copy(chosen_.begin(), chosen_.end(), indices);
  }

 private:
  /// Fills weights_ with the mean share of each block's far keys over rows [first, last]; returns
  /// the mean share of their near keys.
  double pool_shares(int64_t batch, int64_t head, int64_t first, int64_t last, Range visible) {
    constexpr int64_t kRows = IndexScores<Accum>::kRows;
    const HeadRows queries = head_rows(in_.q_dtype, in_.q_index, batch, head, in_.rows);
    const HeadKeys keys = head_keys(in_, batch, in_.index_map[head]);
    std::fill(weights_.begin(), weights_.end(), 0.0);
    double near = 0;
    for (int64_t row = first; row <= last; row += kRows) {
      const int64_t count = std::min(kRows, last + 1 - row);
      for (int64_t i = 0; i < count; ++i) scores_.set_query(i, queries, row + i);
      scores_.run(count, keys, visible.begin, visible.end);
      for (int64_t i = 0; i < count; ++i) {
        near += add_row(batch, head, row + i, visible.begin, scores_.row(i));
      }
    }
    const double scale = 1.0 / static_cast<double>(last + 1 - first);
    for (double& weight : weights_) weight *= scale;
    return near * scale;
  }

  double add_row(int64_t batch, int64_t head, int64_t row, int64_t start, const Accum* scores) {
    const FarKeys far = far_keys(in_, start, in_.keys - in_.rows + row);
    const Accum near = near_mass(in_, batch, head, row, start, far, scores);
    const int64_t first_block = far.begin / in_.block_size;
    const int64_t count = block_masses(scores, far, in_.block_size, masses_.data(),
                                       p_.rank_by_max ? largest<Accum> : log_sum_exp<Accum>);
    const Accum total = log_add(near, log_sum_exp(masses_.data(), count));
    for (int64_t i = 0; i < count; ++i) {
      weights_[first_block + i] += std::exp(static_cast<double>(masses_[i]) - total);
    }
    return std::exp(static_cast<double>(near) - total);
  }

  void choose(int64_t head, double near_share, Range visible, Range sinks, Range window) {
    const double threshold = static_cast<const Accum*>(p_.threshold_ptr)[head];
    std::fill(forced_.begin(), forced_.end(), 0);
    for (const Range& range : {sinks, window}) {
      for (int64_t n = range.begin; n < range.end; n = (n / in_.block_size + 1) * in_.block_size) {
        forced_[n / in_.block_size] = 1;
      }
    }
    chosen_.clear();
    candidates_.clear();
    share_ = near_share;
    bool poisoned = near_share != near_share;
    const int64_t last_block = (visible.end - 1) / in_.block_size;
    for (int64_t block = visible.begin / in_.block_size; block <= last_block; ++block) {
      poisoned |= weights_[block] != weights_[block];
      if (forced_[block]) share_ += weights_[block];
      (forced_[block] ? chosen_ : candidates_).push_back(static_cast<int32_t>(block));
    }
    if (poisoned) {
      share_ = std::numeric_limits<double>::quiet_NaN();
    } else {
      std::stable_sort(candidates_.begin(), candidates_.end(),
                       [&](int32_t a, int32_t b) { return weights_[a] > weights_[b]; });
    }
    int64_t added = 0;
    for (const int32_t block : candidates_) {
      if (share_ >= threshold && added >= p_.min_blocks) break;
      chosen_.push_back(block);
      share_ += weights_[block];
      ++added;
    }
    std::sort(chosen_.begin(), chosen_.end());
  }

  const SelectTilesParams& p_;
  const IndexParams& in_;
  const int64_t blocks_;
  IndexScores<Accum> scores_;
  std::vector<Accum> masses_;    // of one row's blocks, from its first far one on
  std::vector<double> weights_;  // of all blocks
  std::vector<char> forced_;
  std::vector<int32_t> chosen_, candidates_;
  double share_ = 0;
};

template <typename Accum>
void select_all_tiles(const SelectTilesParams& params) {
  const int64_t per_sequence = params.index.heads * params.tiles;
  at::parallel_for(0, params.index.batch * per_sequence, 1, [&](int64_t begin, int64_t end) {
    TileSelector<Accum> selector(params);
    for (int64_t i = begin; i < end; ++i) {
      selector.run(i / per_sequence, i % per_sequence / params.tiles, i % params.tiles);
    }
    gemm_release<Accum>();
  });
}

}  // namespace

void select_tiles_kernel(const SelectTilesParams& params) {
  if (params.index.accum == at::kDouble) return select_all_tiles<double>(params);
  select_all_tiles<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
