#include "csrc/cpu/select.h"

#include <vector>

#include "csrc/cpu/index_scores.h"
#include "csrc/cpu/jobs.h"
#include "csrc/cpu/top_p_row.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Selects for all queries that read one head of index keys, IndexScores::kRows at a time.
template <typename Accum>
class Selector {
 public:
  explicit Selector(const SelectParams& params)
      : p_(params),
        scores_(p_.dim, p_.keys),
        members_(p_.keys),
        blocks_(p_.block_size > 1 ? p_.keys / p_.block_size + 1 : 0) {}

  /// One query row of each of `heads`, or several.
  struct Query {
    int64_t head;
    int64_t row;
  };

  void run(int64_t batch, int64_t key_head, const std::vector<Query>& queries) {
    const auto count = static_cast<int64_t>(queries.size());
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
      const HeadRows rows = head_rows(p_.q_dtype, p_.q_index, batch, queries[i].head, p_.rows);
      scores_.set_query(i, rows, queries[i].row);
      last = std::max(last, position(queries[i].row));
    }
    const HeadRows keys = head_rows(p_.k_dtype, p_.k_index, batch, key_head, p_.keys);
    const int64_t start = p_.start_ptr ? std::max<int64_t>(0, p_.start_ptr[batch]) : 0;
    scores_.run(count, keys, start, last + 1);
    for (int64_t i = 0; i < count; ++i) choose_members(batch, queries[i], start, scores_.row(i));
  }

 private:
  int64_t position(int64_t row) const { return p_.keys - p_.rows + row; }

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
  IndexScores<Accum> scores_;
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
          if (!open ||
              static_cast<int64_t>(units.back().queries.size()) == IndexScores<Accum>::kRows) {
            units.push_back({b, key_head, {}});
            open = true;
          }
          units.back().queries.push_back({head, row});
        }
      }
    }
  }
  // Scoring a key costs dim multiply-adds, selecting it about as much as kSelectWork.
  constexpr double kSelectWork = 64;
  const double work = static_cast<double>(params.batch * params.heads * params.rows) *
                      static_cast<double>(params.keys) * (params.dim + kSelectWork);
  run_jobs(units.size(), work, [&](const auto& next) {
    Selector<Accum> selector(params);
    for (int64_t i = next(); i >= 0; i = next()) {
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
