#include "csrc/cpu/retrieval_scores.h"

#include <ATen/Parallel.h>

#include <vector>

#include "csrc/cpu/lanes.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Scores one head at a time; T operands in the products.
template <typename T>
class HeadScorer {
  using Accum = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Accum>;

 public:
  explicit HeadScorer(const RetrievalScoresParams& params)
      : p_(params),
        queries_(kLanes * p_.dim),
        packed_(kLanes * p_.dim),
        staging_(kKeyTile * p_.dim),
        scores_(kKeyTile * kLanes) {}

  /// Mean over the rows of the attention mass on [pre_begin, pre_end).
  Accum score(int64_t batch, int64_t head) {
    const HeadRows q = head_rows(p_.dtype, p_.q, batch, head, p_.rows);
    const HeadRows k =
        head_rows(p_.dtype, p_.k, batch, head / (p_.query_heads / p_.kv_heads), p_.keys);
    const int64_t start = p_.start_ptr ? std::max<int64_t>(0, p_.start_ptr[batch]) : 0;
    double mass = 0;
    for (int64_t begin = 0; begin < p_.rows; begin += kLanes) {
      mass += block_mass(q, k, begin, std::min(kLanes, p_.rows - begin), start);
    }
    return static_cast<Accum>(mass / p_.rows);
  }

 private:
  double block_mass(const HeadRows& q, const HeadRows& k, int64_t begin, int64_t count,
                    int64_t start) {
    copy_head_rows(q, begin, count, queries_.data(), p_.dim);
    pack_lanes(queries_.data(), count, p_.dim, packed_.data(), staging_.data());
    const int64_t first_m = p_.keys - p_.rows + begin;
    std::array<int64_t, kLanes> positions;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      positions[lane] = lane < count ? first_m + lane : -1;
    }
    max_.fill(-std::numeric_limits<Accum>::infinity());
    sum_.fill(0);
    pre_sum_.fill(0);
    for (int64_t n = start; n < first_m + count; n += kKeyTile) {
      const Operand<T> keys = key_tile(k, n, p_.dim, staging_.data());
      gemm<T>(kKeyTile, kLanes, p_.dim, keys.ptr, keys.stride, packed_.data(), kLanes,
              scores_.data(), kLanes, false);
      add_tile(n, last_in_tile<Accum>(positions, n), n + kKeyTile > first_m || count < kLanes);
    }
    double mass = 0;
    for (int64_t lane = 0; lane < count; ++lane) {
      if (!(max_[lane] == -std::numeric_limits<Accum>::infinity())) {
        mass += pre_sum_[lane] / sum_[lane] + (max_[lane] - max_[lane]);
      }
    }
    return mass;
  }

  void add_tile(int64_t n, const Lanes<Accum>& last, bool masked) {
    const int64_t pre_begin = std::clamp<int64_t>(p_.pre_begin - n, 0, kKeyTile);
    const int64_t pre_end = std::clamp<int64_t>(p_.pre_end - n, pre_begin, kKeyTile);
    const Vec scale(static_cast<Accum>(p_.scale));
    const Vec hidden(-std::numeric_limits<Accum>::infinity());
    for (int64_t lane = 0; lane < kLanes; lane += Vec::size()) {
      Accum* scores = scores_.data() + lane;
      const Vec last_key = Vec::loadu(last.data() + lane);
      Vec maximum = Vec::loadu(max_.data() + lane);
      for (int64_t i = 0; i < kKeyTile; ++i) {
        Vec score = Vec::loadu(scores + i * kLanes) * scale;
        if (masked) score = choose(Vec(static_cast<Accum>(i)) <= last_key, score, hidden);
        score.store(scores + i * kLanes);
        maximum = at::vec::maximum(maximum, score);
      }
      Lanes<Accum> shift;
      for (int64_t j = lane; j < lane + Vec::size(); ++j) {
        const Accum old = max_[j];
        max_[j] = poison_infinity(reinterpret_cast<const Accum*>(&maximum)[j - lane]);
        shift[j] = finite_shift(max_[j]);
        const Accum decay = std::exp(old - shift[j]);
        sum_[j] *= decay;
        pre_sum_[j] *= decay;
      }
      const Vec offset = Vec::loadu(shift.data() + lane);
      const auto sum = [&](int64_t from, int64_t to) {
        Vec total(Accum(0));
        for (int64_t i = from; i < to; ++i) {
          total = total + fast_exp(Vec::loadu(scores + i * kLanes) - offset);
        }
        return total;
      };
      const Vec pre = sum(pre_begin, pre_end);
      const Vec others = sum(0, pre_begin) + sum(pre_end, kKeyTile);
      (Vec::loadu(pre_sum_.data() + lane) + pre).store(pre_sum_.data() + lane);
      (Vec::loadu(sum_.data() + lane) + pre + others).store(sum_.data() + lane);
    }
  }

  const RetrievalScoresParams& p_;
  std::vector<T> queries_, packed_, staging_;
  std::vector<Accum> scores_;
  Lanes<Accum> max_, sum_, pre_sum_;
};

template <typename T>
void score_heads(const RetrievalScoresParams& params) {
  auto* scores = static_cast<at::opmath_type<T>*>(params.scores_ptr);
  at::parallel_for(0, params.batch * params.query_heads, 1, [&](int64_t begin, int64_t end) {
    HeadScorer<T> scorer(params);
    for (int64_t i = begin; i < end; ++i) {
      scores[i] = scorer.score(i / params.query_heads, i % params.query_heads);
    }
    gemm_release<T>();
  });
}

}  // namespace

void retrieval_scores_kernel(const RetrievalScoresParams& params) {
  if (params.dtype == at::kDouble) return score_heads<double>(params);
  if (params.dtype == at::kBFloat16 && has_brgemm<at::BFloat16>()) {
    return score_heads<at::BFloat16>(params);
  }
  score_heads<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
