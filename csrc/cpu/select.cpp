#include "csrc/cpu/select.h"

#include <vector>

#include "csrc/cpu/index_scores.h"
#include "csrc/cpu/jobs.h"
#include "csrc/cpu/refine.h"
#include "csrc/cpu/top_p_row.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Selects for all queries that read one head of index keys, IndexScores::kRows at a time.
template <typename Accum>
class Selector {
 public:
  explicit Selector(const SelectParams& params)
      : p_(params),
        in_(params.index),
        scores_(in_.dim, in_.keys),
        refiner_(in_.dim),
        members_(in_.keys),
        blocks_(in_.block_size > 1 ? in_.keys / in_.block_size + 1 : 0) {}

  /// One query row of each of `heads`, or several.
  struct Query {
    int64_t head;
    int64_t row;
  };

  void run(int64_t batch, int64_t key_head, const std::vector<Query>& queries) {
    const auto count = static_cast<int64_t>(queries.size());
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
      const HeadRows rows = head_rows(in_.q_dtype, in_.q_index, batch, queries[i].head, in_.rows);
      scores_.set_query(i, rows, queries[i].row);
      last = std::max(last, position(queries[i].row));
    }
    const int64_t start = first_key(in_, batch);
    const HeadKeys keys = head_keys(in_, batch, key_head);
    scores_.run(count, keys, start, last + 1);
    for (int64_t i = 0; i < count; ++i) choose_members(batch, queries[i], start, keys, i);
  }

 private:
  int64_t position(int64_t row) const { return in_.keys - in_.rows + row; }

  void choose_members(int64_t batch, const Query& query, int64_t start, const HeadKeys& keys,
                      int64_t slot) {
    const Accum* scores = scores_.row(slot);
    const int64_t m = position(query.row);
    const int64_t place = (batch * in_.heads + query.head) * in_.rows + query.row;
    FarKeys far{start, start};
    Accum near = -std::numeric_limits<Accum>::infinity();
    if (m >= start) {
      far = far_keys(in_, start, m);
      near = near_mass(in_, batch, query.head, query.row, start, far, scores);
    }
    TopPResult result;
    const bool exact = p_.exact || in_.refine;
    if (in_.block_size == 1) {
      const Accum* first = scores + far.begin;
      const int64_t count = far.end - far.begin;
      result =
          top_p_row(first, count, p_.p, p_.min_members, near, exact, members_.data(), scratch_);
      if (in_.refine && p_.p < 1.0 && result.count > 0 && !std::isnan(result.mass)) {
        result = refiner_.run(first, count, result.count, scores_.query(slot), keys, far.begin,
                              p_.p, p_.min_members, near, members_.data(), scratch_);
      }
    } else {
      const int64_t count =
          block_masses(scores, far, in_.block_size, blocks_.data(), log_sum_exp<Accum>);
      result = top_p_row(blocks_.data(), count, p_.p, p_.min_members, near, exact, members_.data(),
                         scratch_);
    }
    const int64_t first = far.begin / in_.block_size;
    const bool fits = result.count <= p_.capacity;
    int32_t* indices = p_.indices_ptr + place * p_.capacity;
    const int64_t kept = fits ? result.count : 0;
    for (int64_t i = 0; i < kept; ++i) indices[i] = static_cast<int32_t>(first + members_[i]);
    std::fill(indices + kept, indices + p_.capacity, -1);
    p_.counts_ptr[place] = fits ? static_cast<int32_t>(result.count) : -1;
    static_cast<Accum*>(p_.mass_ptr)[place] = static_cast<Accum>(result.mass);
  }

  const SelectParams& p_;
  const IndexParams& in_;
  IndexScores<Accum> scores_;
  Refiner<Accum> refiner_;
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
  const IndexParams& in = params.index;
  std::vector<Unit<Accum>> units;
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t key_head = 0; key_head < in.key_heads; ++key_head) {
      bool open = false;
      for (int64_t row = 0; row < in.rows; ++row) {
        for (int64_t head = 0; head < in.heads; ++head) {
          if (in.index_map[head] != key_head) continue;
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
  const double work = static_cast<double>(in.batch * in.heads * in.rows) *
                      static_cast<double>(in.keys) * (in.dim + kSelectWork);
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
  if (params.index.accum == at::kDouble) return select_rows<double>(params);
  select_rows<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
