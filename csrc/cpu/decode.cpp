#include "csrc/cpu/decode.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include "csrc/cpu/attention_mask.h"
#include "csrc/cpu/jobs.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/softmax.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kSplitKeys = 1024;  // the unit of parallel work; fixed, so that results repeat
constexpr int64_t kChunkKeys = 128;   // keys whose logits are held at once

/// Part of the keys of one head set of one sequence: positions [begin, end), or the members
/// [begin, end) of its list.
struct Split {
  int64_t batch;
  const HeadSet* set;
  bool listed;
  int64_t begin;
  int64_t end;
  int64_t partial;  // place of its first head among the partial results
};

/// Splits of one head set of one sequence, all of whose results are merged.
struct Group {
  int64_t batch;
  const HeadSet* set;
  size_t first_split;
  size_t last_split;
};

class Plan {
 public:
  explicit Plan(const DecodeParams& params) : p_(params) {
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (const HeadSet& set : *p_.head_sets) {
        const size_t first = splits.size();
        add_splits(b, set);
        groups.push_back({b, &set, first, splits.size()});
      }
    }
  }

  std::vector<Split> splits;
  std::vector<Group> groups;
  int64_t partials = 0;
  int64_t pairs = 0;  // of query heads and keys

 private:
  void add_splits(int64_t b, const HeadSet& set) {
    const int64_t start = p_.start_ptr ? std::max<int64_t>(0, p_.start_ptr[b]) : 0;
    const int64_t m = p_.length - 1;
    if (set.from_local) {
      add_range(b, set, false, 0, std::min(p_.length - start, p_.slots), kSplitKeys);
      return;
    }
    const int64_t count = set.keys == KeySet::kListed ? p_.counts_ptr[b * p_.lists + set.list] : 0;
    if (set.keys == KeySet::kVisible || count < 0) {
      visible_runs(m, start, runs_);
    } else {
      near_runs(m, m, start, set.keys == KeySet::kListed ? p_.near_window : p_.window, p_.sinks,
                runs_);
    }
    for (const Run& run : runs_) add_range(b, set, false, run.begin, run.end, kSplitKeys);
    add_range(b, set, true, 0, std::min(count, p_.capacity),
              std::max<int64_t>(1, kSplitKeys / p_.block_size));
  }

  void add_range(int64_t b, const HeadSet& set, bool listed, int64_t begin, int64_t end,
                 int64_t step) {
    for (; begin < end; begin += step) {
      splits.push_back({b, &set, listed, begin, std::min(begin + step, end), partials});
      const int64_t heads = static_cast<int64_t>(set.heads.size());
      partials += heads;
      pairs += heads * (splits.back().end - begin) * (listed ? p_.block_size : 1);
    }
  }

  const DecodeParams& p_;
  std::vector<Run> runs_;
};

/// Two vectors of accumulators' worth of elements, from memory of type S.
template <typename S>
struct Pair {
  using Accum = at::opmath_type<S>;
  using Vec = at::vec::Vectorized<Accum>;
  static constexpr int64_t kSize = 2 * Vec::size();

  Vec low{Accum(0)};
  Vec high{Accum(0)};

  /// The first `count` <= kSize elements from `source`, then zeros.
  static Pair load(const S* source, int64_t count) {
    if constexpr (sizeof(S) == 2) {
      const auto [low, high] = at::vec::convert_to_float(
          count == kSize ? at::vec::Vectorized<S>::loadu(source) : load_part(source, count));
      return {low, high};
    } else {
      if (count == kSize) return {Vec::loadu(source), Vec::loadu(source + Vec::size())};
      Pair pair;
      pair.low = Vec::loadu(source, std::min<int64_t>(count, Vec::size()));
      if (count > Vec::size()) pair.high = Vec::loadu(source + Vec::size(), count - Vec::size());
      return pair;
    }
  }

 private:
  static at::vec::Vectorized<S> load_part(const S* source, int64_t count) {
    std::array<S, at::vec::Vectorized<S>::size()> padded{};
    std::copy_n(source, count, padded.begin());
    return at::vec::Vectorized<S>::loadu(padded.data());
  }
};

/// Attention of the heads of one set over the keys of one split.
template <typename S>
class SplitWorker {
  using Accum = at::opmath_type<S>;
  using Vec = at::vec::Vectorized<Accum>;

 public:
  SplitWorker(const DecodeParams& params, int64_t padded_dim, Accum* row_max, Accum* row_sum,
              Accum* sums)
      : p_(params), padded_dim_(padded_dim), row_max_(row_max), row_sum_(row_sum), sums_(sums) {}

  void run(const Split& split) {
    load_queries(split);
    if (!split.listed) {
      for (int64_t n = split.begin; n < split.end; ++n) add_key(n);
    } else {
      const int64_t start = p_.start_ptr ? std::max<int64_t>(0, p_.start_ptr[split.batch]) : 0;
      const int64_t far_begin = start + p_.sinks;
      const int64_t far_end = p_.length - p_.near_window;
      const int32_t* list =
          p_.indices_ptr + (split.batch * p_.lists + split.set->list) * p_.capacity;
      for (int64_t i = split.begin; i < split.end; ++i) {
        const int64_t begin = std::max(far_begin, list[i] * p_.block_size);
        const int64_t end = std::min(far_end, (list[i] + 1) * p_.block_size);
        for (int64_t n = begin; n < end; ++n) add_key(n);
      }
    }
    attend_chunk();
  }

 private:
  void load_queries(const Split& split) {
    const HeadSet& set = *split.set;
    heads_ = static_cast<int64_t>(set.heads.size());
    partial_ = split.partial;
    queries_.assign(heads_ * padded_dim_, Accum(0));
    scores_.resize(heads_ * kChunkKeys);
    const S* q = static_cast<const S*>(p_.q.ptr) + split.batch * p_.q.batch_stride;
    for (int64_t j = 0; j < heads_; ++j) {
      copy_row(q + set.heads[j] * p_.q.head_stride, queries_.data() + j * padded_dim_, p_.dim);
    }
    const HeadsView& k = set.from_local ? p_.k_local : p_.k;
    const HeadsView& v = set.from_local ? p_.v_local : p_.v;
    k_head_ =
        static_cast<const S*>(k.ptr) + split.batch * k.batch_stride + set.kv_head * k.head_stride;
    v_head_ =
        static_cast<const S*>(v.ptr) + split.batch * v.batch_stride + set.kv_head * v.head_stride;
    k_row_stride_ = k.row_stride;
    v_row_stride_ = v.row_stride;
    std::fill_n(row_max_ + partial_, heads_, -std::numeric_limits<Accum>::infinity());
    std::fill_n(row_sum_ + partial_, heads_, Accum(0));
    std::fill_n(sums_ + partial_ * padded_dim_, heads_ * padded_dim_, Accum(0));
    columns_ = 0;
  }

  void add_key(int64_t n) {
    values_[columns_] = v_head_ + n * v_row_stride_;
    const S* key = k_head_ + n * k_row_stride_;
    for (int64_t j = 0; j < heads_; ++j) {
      scores_[j * kChunkKeys + columns_] = dot(queries_.data() + j * padded_dim_, key);
    }
    if (++columns_ == kChunkKeys) attend_chunk();
  }

  Accum dot(const Accum* query, const S* key) const {
    Pair<S> sum;
    for (int64_t d = 0; d < p_.dim; d += Pair<S>::kSize) {
      const auto part = Pair<S>::load(key + d, std::min(Pair<S>::kSize, p_.dim - d));
      sum.low = at::vec::fmadd(part.low, Vec::loadu(query + d), sum.low);
      sum.high = at::vec::fmadd(part.high, Vec::loadu(query + d + Vec::size()), sum.high);
    }
    return at::vec::vec_reduce_all<Accum>([](Vec& a, Vec& b) { return a + b; }, sum.low + sum.high);
  }

  void attend_chunk() {
    if (columns_ == 0) return;
    for (int64_t j = 0; j < heads_; ++j) {
      Accum* scores = scores_.data() + j * kChunkKeys;
      std::fill(scores + columns_, scores + kChunkKeys, -std::numeric_limits<Accum>::infinity());
      const Accum decay = softmax_row(scores, kChunkKeys, static_cast<Accum>(p_.scale),
                                      row_max_[partial_ + j], row_sum_[partial_ + j], scores);
      add_values(scores, decay, sums_ + (partial_ + j) * padded_dim_);
    }
    columns_ = 0;
  }

  /// sums = decay * sums + weights . values, two pairs of the dimension at a time.
  void add_values(const Accum* weights, Accum decay, Accum* sums) const {
    constexpr int64_t kSize = Pair<S>::kSize;
    const Vec shrink(decay);
    for (int64_t d = 0; d < p_.dim; d += kSize) {
      const int64_t count = std::min(kSize, p_.dim - d);
      Pair<S> sum;
      for (int64_t i = 0; i < columns_; ++i) {
        const auto part = Pair<S>::load(values_[i] + d, count);
        const Vec weight(weights[i]);
        sum.low = at::vec::fmadd(weight, part.low, sum.low);
        sum.high = at::vec::fmadd(weight, part.high, sum.high);
      }
      at::vec::fmadd(shrink, Vec::loadu(sums + d), sum.low).store(sums + d);
      at::vec::fmadd(shrink, Vec::loadu(sums + d + Vec::size()), sum.high)
          .store(sums + d + Vec::size());
    }
  }

  const DecodeParams& p_;
  const int64_t padded_dim_;
  Accum* row_max_;
  Accum* row_sum_;
  Accum* sums_;
  std::vector<Accum> queries_, scores_;
  std::array<const S*, kChunkKeys> values_{};
  const S* k_head_ = nullptr;
  const S* v_head_ = nullptr;
  int64_t k_row_stride_ = 0, v_row_stride_ = 0, heads_ = 0, partial_ = 0, columns_ = 0;
};

template <typename S>
void decode_splits(const DecodeParams& params) {
  using Accum = at::opmath_type<S>;
  constexpr Accum kNothing = -std::numeric_limits<Accum>::infinity();
  const Plan plan(params);
  const int64_t dim = params.dim;
  const int64_t padded_dim = (dim + Pair<S>::kSize - 1) / Pair<S>::kSize * Pair<S>::kSize;
  std::vector<Accum> row_max(plan.partials), row_sum(plan.partials);
  std::vector<Accum> sums(plan.partials * padded_dim);
  const double work = 2.0 * static_cast<double>(plan.pairs * dim);
  run_jobs(plan.splits.size(), work, [&](const auto& next) {
    SplitWorker<S> worker(params, padded_dim, row_max.data(), row_sum.data(), sums.data());
    for (int64_t i; (i = next()) >= 0;) worker.run(plan.splits[i]);
  });

  auto* lse = static_cast<Accum*>(params.lse_ptr);
  std::vector<Accum> merged(dim);
  for (const Group& group : plan.groups) {
    for (size_t j = 0; j < group.set->heads.size(); ++j) {
      const auto partial = [&](size_t split) {
        return plan.splits[split].partial + static_cast<int64_t>(j);
      };
      Accum largest = kNothing;
      for (size_t s = group.first_split; s < group.last_split; ++s) {
        if (!(row_max[partial(s)] <= largest)) largest = row_max[partial(s)];
      }
      std::fill(merged.begin(), merged.end(), Accum(0));
      Accum total = 0;
      for (size_t s = group.first_split; s < group.last_split; ++s) {
        const int64_t place = partial(s);
        if (row_max[place] == kNothing) continue;
        const Accum share = std::exp((row_max[place] - largest) * static_cast<Accum>(params.scale));
        total += share * row_sum[place];
        for (int64_t d = 0; d < dim; ++d) merged[d] += share * sums[place * padded_dim + d];
      }
      const int64_t head = group.set->heads[j];
      lse[group.batch * params.heads + head] =
          largest * static_cast<Accum>(params.scale) + std::log(total);
      S* out = static_cast<S*>(params.out.ptr) + group.batch * params.out.batch_stride +
               head * params.out.head_stride;
      scale_row(merged.data(), total == Accum(0) ? Accum(0) : Accum(1) / total, out, dim);
    }
  }
}

}  // namespace

void decode_kernel(const DecodeParams& params) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, params.dtype, "decode",
                                  [&] { decode_splits<scalar_t>(params); });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
