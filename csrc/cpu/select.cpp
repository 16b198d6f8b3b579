#include "csrc/cpu/select.h"

#include <ATen/Parallel.h>

#include <vector>

#include "csrc/cpu/lanes.h"
#include "csrc/cpu/top_p_row.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kRows = 16;  // query rows scored together

/// log of the sum of exp(scores[0, size)); -inf for nothing, NaN for NaN or +inf.
template <typename Accum>
Accum log_sum_exp(const Accum* scores, int64_t size) {
  using Vec = at::vec::Vectorized<Accum>;
  constexpr Accum kNone = -std::numeric_limits<Accum>::infinity();
  if (size <= 0) return kNone;
  const Accum top = poison_infinity(at::vec::reduce_all<Accum>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, scores, size));
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
  return top + std::log(std::exp(a - finite_shift(top)) + std::exp(b - finite_shift(top))) -
         (top - finite_shift(top));
}

/// Selects for all queries that read one head of index keys, kRows at a time.
template <typename Accum>
class Selector {
 public:
  explicit Selector(const SelectParams& params)
      : p_(params),
        width_((p_.keys + kKeyTile - 1) / kKeyTile * kKeyTile),
        queries_(kRows * p_.dim),
        keys_(kKeyTile * p_.dim),
        staging_(16 * p_.dim),
        scores_(kRows * width_),
        members_(p_.keys),
        blocks_(p_.block_size > 1 ? p_.keys / p_.block_size + 1 : 0) {}

  /// One query row of each of `heads`, or several.
  struct Query {
    int64_t head;
    int64_t row;
  };

  void run(int64_t batch, int64_t key_head, const std::vector<Query>& queries) {
    const auto count = static_cast<int64_t>(queries.size());
    const Accum scale = Accum(1) / std::sqrt(static_cast<Accum>(p_.dim));
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
      const HeadRows rows = head_rows(p_.q_dtype, p_.q_index, batch, queries[i].head, p_.rows);
      Accum* query = queries_.data() + i * p_.dim;
      copy_head_rows(rows, queries[i].row, 1, query, p_.dim);
      scale_row(query, scale, query, p_.dim);
      last = std::max(last, position(queries[i].row));
    }
    const HeadRows keys = head_rows(p_.k_dtype, p_.k_index, batch, key_head, p_.keys);
    const int64_t start = p_.start_ptr ? std::max<int64_t>(0, p_.start_ptr[batch]) : 0;
    for (int64_t n = start / kKeyTile * kKeyTile; n <= last; n += kKeyTile) {
      const int64_t size = std::min(kKeyTile, p_.keys - n);
      copy_transposed(keys, n, size);
      gemm<Accum>(count, kKeyTile, p_.dim, queries_.data(), p_.dim, keys_.data(), kKeyTile,
                  scores_.data() + n, width_, false);
    }
    for (int64_t i = 0; i < count; ++i) {
      choose_members(batch, queries[i], start, scores_.data() + i * width_);
    }
  }

 private:
  int64_t position(int64_t row) const { return p_.keys - p_.rows + row; }

  void copy_transposed(const HeadRows& keys, int64_t n, int64_t size) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, keys.dtype, "select", [&] {
      const auto* rows = static_cast<const scalar_t*>(keys.ptr) + n * keys.stride;
      pack_transposed([&](int64_t i) { return rows + i * keys.stride; }, size, p_.dim, keys_.data(),
                      kKeyTile, staging_.data());
    });
  }

  void choose_members(int64_t batch, const Query& query, int64_t start, const Accum* scores) {
    const int64_t m = position(query.row);
    const int64_t place = (batch * p_.heads + query.head) * p_.rows + query.row;
    const int64_t sinks_end = std::min(start + p_.sinks, m + 1);
    const int64_t far_end = std::max(sinks_end, m - p_.window + 1);
    Accum near = -std::numeric_limits<Accum>::infinity();
    if (m >= start) {
      if (p_.near_lse_ptr) {
        near = static_cast<const Accum*>(p_.near_lse_ptr)[place];
        if (p_.offset_ptr) near -= static_cast<const Accum*>(p_.offset_ptr)[query.head];
      } else {
        near = log_add(log_sum_exp(scores + start, sinks_end - start),
                       log_sum_exp(scores + far_end, m + 1 - far_end));
      }
    }
    const int64_t size = m < start ? 0 : far_end - sinks_end;
    const int64_t first = p_.block_size == 1 ? sinks_end : sinks_end / p_.block_size;
    TopPResult result;
    if (p_.block_size == 1) {
      result = top_p_row(scores + sinks_end, size, p_.p, p_.min_members, near, p_.exact,
                         members_.data(), scratch_);
    } else {
      result = top_p_row(blocks_.data(), fill_blocks(scores, sinks_end, sinks_end + size), p_.p,
                         p_.min_members, near, p_.exact, members_.data(), scratch_);
    }
    const bool fits = result.count <= p_.capacity;
    int32_t* indices = p_.indices_ptr + place * p_.capacity;
    const int64_t kept = fits ? result.count : 0;
    for (int64_t i = 0; i < kept; ++i) indices[i] = static_cast<int32_t>(first + members_[i]);
    std::fill(indices + kept, indices + p_.capacity, -1);
    p_.counts_ptr[place] = fits ? static_cast<int32_t>(result.count) : -1;
    static_cast<Accum*>(p_.mass_ptr)[place] = static_cast<Accum>(result.mass);
  }

  /// Log-masses of the key blocks that far keys [begin, end) touch; returns how many there are.
  int64_t fill_blocks(const Accum* scores, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t n = begin; n < end; ++count) {
      const int64_t block_end = std::min(end, (n / p_.block_size + 1) * p_.block_size);
      blocks_[count] = log_sum_exp(scores + n, block_end - n);
      n = block_end;
    }
    return count;
  }

  const SelectParams& p_;
  const int64_t width_;
  std::vector<Accum> queries_, keys_, staging_, scores_;
  std::vector<int32_t> members_;
  std::vector<Accum> blocks_;
  TopPScratch scratch_;
};

template <typename Accum>
struct Unit {
  int64_t batch;
  int64_t key_head;
  std::vector<typename Selector<Accum>::Query> queries;
};

template <typename Accum>
void select_rows(const SelectParams& params) {
  std::vector<Unit<Accum>> units;
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t key_head = 0; key_head < params.key_heads; ++key_head) {
      bool open = false;
      for (int64_t row = 0; row < params.rows; ++row) {
        for (int64_t head = 0; head < params.heads; ++head) {
          if (params.index_map[head] != key_head) continue;
          if (!open || static_cast<int64_t>(units.back().queries.size()) == kRows) {
            units.push_back({b, key_head, {}});
            open = true;
          }
          units.back().queries.push_back({head, row});
        }
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    Selector<Accum> selector(params);
    for (int64_t i = begin; i < end; ++i) {
      selector.run(units[i].batch, units[i].key_head, units[i].queries);
    }
    gemm_release<Accum>();
  });
}

}  // namespace

void select_kernel(const SelectParams& params) {
  if (params.accum == at::kDouble) return select_rows<double>(params);
  select_rows<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
