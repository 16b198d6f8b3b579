#pragma once
// Index logits of a few query rows over all keys, and the log-masses taken from them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/cpu/index_codes.h"
#include "csrc/cpu/index_params.h"
#include "csrc/cpu/lanes.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// The largest of scores[0, size), size >= 1; NaN for NaN or +inf.
template <typename Accum>
Accum largest(const Accum* scores, int64_t size) {
  using Vec = at::vec::Vectorized<Accum>;
  return poison_infinity(at::vec::reduce_all<Accum>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, scores, size));
}

/// log of the sum of exp(scores[0, size)); -inf for nothing, NaN for NaN or +inf.
template <typename Accum>
Accum log_sum_exp(const Accum* scores, int64_t size) {
  using Vec = at::vec::Vectorized<Accum>;
  constexpr Accum kNone = -std::numeric_limits<Accum>::infinity();
  if (size <= 0) return kNone;
  const Accum top = largest(scores, size);
  if (!(top > kNone)) return top;
  const Accum sum = at::vec::map_reduce_all<Accum>(
      [top](const Vec& x) { return fast_exp(x - Vec(top)); },
      [](const Vec& a, const Vec& b) { return a + b; }, scores, size);
  return top + std::log(sum);
}

template <typename Accum>
Accum log_add(Accum a, Accum b) {
  if (a != a || b != b) return a + b;
  const Accum top = std::max(a, b);
  if (std::isinf(top)) return top;
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}

/// The keys of one head: first `codes`, then `rows`.
struct HeadKeys {
  CodeRows codes;
  HeadRows rows;
};

inline HeadKeys head_keys(const IndexParams& params, int64_t batch, int64_t head) {
  return {code_rows(params, batch, head),
          head_rows(params.k_dtype, params.k_index, batch, head, params.keys - params.coded)};
}

/// Scores up to kRows queries, r^-1/2 q . k, against the keys of one head.
template <typename Accum>
class IndexScores {
 public:
  static constexpr int64_t kRows = 16;

  IndexScores(int64_t dim, int64_t keys)
      : dim_(dim),
        keys_(keys),
        width_((keys + kKeyTile - 1) / kKeyTile * kKeyTile),
        queries_(kRows * dim),
        packed_(kKeyTile * dim),
        staging_(kPackedGroup * dim),
        ranges_(2 * dim),
        scores_(kRows * width_) {}

  /// Sets query `slot` to row `n` of `rows`.
  void set_query(int64_t slot, const HeadRows& rows, int64_t n) {
    Accum* query = queries_.data() + slot * dim_;
    copy_head_rows(rows, n, 1, query, dim_);
    scale_row(query, Accum(1) / std::sqrt(static_cast<Accum>(dim_)), query, dim_);
  }

  /// Scores the first `count` queries against keys [begin, end), and some around them.
  void run(int64_t count, const HeadKeys& keys, int64_t begin, int64_t end) {
    for (int64_t n = begin / kKeyTile * kKeyTile; n < end; n += kKeyTile) {
      const int64_t tile_end = std::min(n + kKeyTile, keys_);
      const int64_t codes_end = std::clamp(keys.codes.count, n, tile_end);
      pack_codes(keys.codes, n, codes_end);
      pack_keys(keys.rows, codes_end - keys.codes.count, tile_end - codes_end,
                packed_.data() + codes_end - n);
      gemm<Accum>(count, kKeyTile, dim_, queries_.data(), dim_, packed_.data(), kKeyTile,
                  scores_.data() + n, width_, false);
    }
  }

  /// Query `slot`, with the scale of the scores.
  const Accum* query(int64_t slot) const { return queries_.data() + slot * dim_; }

  /// The scores of query `slot`, by key.
  const Accum* row(int64_t slot) const { return scores_.data() + slot * width_; }

 private:
  void pack_codes(const CodeRows& codes, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += kIndexBlock) {
      copy_row(codes.block_ranges(n), ranges_.data(), 2 * dim_);
      pack_loaded(
          [&](int64_t i, Accum* key) {
            dequantize(codes.key(n + i), codes.bits, ranges_.data(), dim_, key);
          },
          kIndexBlock, dim_, packed_.data() + n - begin, kKeyTile, staging_.data());
    }
  }

  void pack_keys(const HeadRows& rows, int64_t n, int64_t count, Accum* packed) {
    if (count == 0) return;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.dtype, "index_scores", [&] {
      const auto* first = static_cast<const scalar_t*>(rows.ptr) + n * rows.stride;
      pack_transposed([&](int64_t i) { return first + i * rows.stride; }, count, dim_, packed,
                      kKeyTile, staging_.data());
    });
  }

  const int64_t dim_, keys_, width_;
  std::vector<Accum> queries_, packed_, staging_, ranges_, scores_;
};

/// First real key of a sequence.
inline int64_t first_key(const IndexParams& params, int64_t batch) {
  return params.start_ptr ? std::max<int64_t>(0, params.start_ptr[batch]) : 0;
}

/// The far keys [begin, end) of the row at position m >= start: behind the sinks, before the
/// window.
struct FarKeys {
  int64_t begin, end;
};

inline FarKeys far_keys(const IndexParams& params, int64_t start, int64_t m) {
  const int64_t sinks_end = std::min(start + params.sinks, m + 1);
  return {sinks_end, std::max(sinks_end, m - params.window + 1)};
}

/// Log-mass of the row's near keys on the scale of its scores: the given one without the offset
/// that all far keys share, or that of the scores of sinks and window.
template <typename Accum>
Accum near_mass(const IndexParams& params, int64_t batch, int64_t head, int64_t row, int64_t start,
                FarKeys far, const Accum* scores) {
  if (params.near_lse_ptr) {
    const auto* near_lse = static_cast<const Accum*>(params.near_lse_ptr);
    const Accum near = near_lse[(batch * params.heads + head) * params.rows + row];
    return params.offset_ptr ? near - static_cast<const Accum*>(params.offset_ptr)[head] : near;
  }
  const int64_t m = params.keys - params.rows + row;
  return log_add(log_sum_exp(scores + start, far.begin - start),
                 log_sum_exp(scores + far.end, m + 1 - far.end));
}

/// Fills `masses` with mass(scores, size) of each key block that the far keys touch, from block
/// far.begin / block_size on; returns how many there are.
template <typename Accum, typename Mass>
int64_t block_masses(const Accum* scores, FarKeys far, int64_t block_size, Accum* masses,
                     const Mass& mass) {
  int64_t count = 0;
  for (int64_t n = far.begin; n < far.end; ++count) {
    const int64_t end = std::min(far.end, (n / block_size + 1) * block_size);
    masses[count] = mass(scores + n, end - n);
    n = end;
  }
  return count;
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
