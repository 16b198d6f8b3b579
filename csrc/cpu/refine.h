#pragma once
// A selection by codes, chosen again by the 16-bit keys of twice its members.

#include <algorithm>
#include <vector>

#include "csrc/cpu/index_scores.h"
#include "csrc/cpu/top_p_row.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

template <typename Accum>
class Refiner {
 public:
  explicit Refiner(int64_t dim) : key_(dim) {}

  /// The choice among the 2 c best of scores[0, n), which belong to the keys from `first` on, when
  /// `c` >= 1 of them were chosen by these scores; positions go to `out`, ascending. `query` has
  /// the scale of the scores.
  TopPResult run(const Accum* scores, int64_t n, int64_t c, const Accum* query,
                 const HeadKeys& keys, int64_t first, double p, int64_t min_members, Accum near,
                 int32_t* out, TopPScratch& scratch) {
    best_.resize(n);
    // No mass is asked for, only a count.
    best_.resize(top_p_row(scores, n, 0.0, 2 * c, near, true, best_.data(), scratch).count);
    rest_.assign(scores, scores + n);
    scores_.clear();
    for (const int32_t i : best_) {
      const int64_t key = first + i;
      scores_.push_back(key < keys.codes.count ? score(query, keys, key) : scores[i]);
      rest_[i] = -std::numeric_limits<Accum>::infinity();
    }
    const TopPResult result =
        top_p_row(scores_.data(), static_cast<int64_t>(scores_.size()), p, min_members, near, true,
                  out, scratch, log_sum_exp(rest_.data(), n));
    for (int64_t i = 0; i < result.count; ++i) out[i] = best_[out[i]];
    return result;
  }

 private:
  /// Of a key that also has codes, as `rows` go on before their first row.
  Accum score(const Accum* query, const HeadKeys& keys, int64_t n) {
    copy_head_row(keys.rows, n - keys.codes.count, key_.data(), static_cast<int64_t>(key_.size()));
    Accum sum = 0;
    for (size_t d = 0; d < key_.size(); ++d) sum += query[d] * key_[d];
    return sum;
  }

  std::vector<Accum> key_, rest_, scores_;
  std::vector<int32_t> best_;
};

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
