#include "csrc/cpu/index_kl.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "csrc/cpu/lanes.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// Tasks that share the heads of a call at least; a constant, so that results do not depend on the
/// number of threads.
constexpr int64_t kMinTasks = 8;

/// Rows of one sequence that see a key, by position.
std::vector<int64_t> valid_rows(const IndexKlParams& p, int64_t batch, int64_t start) {
  const int64_t* positions = p.rows_ptr + batch * p.rows;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (positions[i] >= start) rows.push_back(i);
  }
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int64_t a, int64_t b) { return positions[a] < positions[b]; });
  return rows;
}

/// Loss and gradients of blocks of kLanes rows of one head; T operands in the true logits. Two
/// passes over the keys: logits, running softmax sums and the KL, then gradients from the logits
/// kept.
template <typename T>
class BlockWorker {
  using Accum = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Accum>;

 public:
  BlockWorker(const IndexKlParams& params, int64_t valid)
      : p_(params),
        weight_(Accum(1) / static_cast<Accum>(std::max<int64_t>(1, valid))),
        index_scale_(Accum(1) / std::sqrt(static_cast<Accum>(p_.index_dim))),
        rows_(kLanes * p_.dim),
        queries_(kLanes * p_.dim),
        key_staging_(kKeyTile * p_.dim),
        index_rows_(kLanes * p_.index_dim),
        index_queries_(kLanes * p_.index_dim),
        index_staging_(kKeyTile * p_.index_dim),
        index_keys_(kKeyTile * p_.index_dim),
        transpose_staging_(16 * p_.index_dim),
        grad_keys_(kKeyTile * p_.index_dim),
        grad_queries_(kLanes * p_.index_dim),
        true_logits_((p_.keys + kKeyTile) * kLanes),
        index_logits_((p_.keys + kKeyTile) * kLanes) {}

  /// Adds the block's share to grad_k [keys, index_dim]; returns its share of grad_offset.
  double run(int64_t batch, int64_t j, int64_t start, const int64_t* rows, int64_t count,
             Accum* grad_k) {
    load(batch, j, start, rows, count);
    for (int64_t n = start_; n <= max_m_; n += kKeyTile) {
      score(n);
      if (plain(n)) {
        accumulate<true>(n);
      } else {
        accumulate<false>(n);
      }
    }
    finish_rows(batch, j, rows, count);
    std::fill(grad_queries_.begin(), grad_queries_.end(), Accum(0));
    grad_offset_.fill(0);
    for (int64_t n = start_; n <= max_m_; n += kKeyTile) {
      if (plain(n)) {
        differentiate<true>(n);
      } else {
        differentiate<false>(n);
      }
      multiply_gradients(n, grad_k);
    }
    store_grad_q(batch, j, rows, count);
    return std::accumulate(grad_offset_.begin(), grad_offset_.end(), 0.0);
  }

 private:
  void load(int64_t batch, int64_t j, int64_t start, const int64_t* rows, int64_t count) {
    const int64_t head = p_.retrieval_heads[j];
    const HeadRows q = head_rows(p_.dtype, p_.q, batch, head, p_.rows);
    const HeadRows q_index = head_rows(p_.q_index_dtype, p_.q_index, batch, j, p_.rows);
    // Keys that no row of the block sees are not read: their gradient of 0 would not hide a NaN.
    const int64_t seen = p_.rows_ptr[batch * p_.rows + rows[count - 1]] + 1;
    keys_ = head_rows(p_.dtype, p_.k, batch, head / p_.group, seen);
    index_head_ = head_rows(p_.k_index_dtype, p_.k_index, batch, p_.index_map[j], seen);
    offset_ = p_.offset_ptr ? static_cast<const Accum*>(p_.offset_ptr)[j] : Accum(0);
    start_ = start;
    std::fill(index_rows_.begin(), index_rows_.end(), Accum(0));
    for (int64_t lane = 0; lane < count; ++lane) {
      copy_head_rows(q, rows[lane], 1, rows_.data() + lane * p_.dim, p_.dim);
      Accum* index_row = index_rows_.data() + lane * p_.index_dim;
      copy_head_rows(q_index, rows[lane], 1, index_row, p_.index_dim);
      scale_row(index_row, index_scale_, index_row, p_.index_dim);
      positions_[lane] = p_.rows_ptr[batch * p_.rows + rows[lane]];
    }
    // Lanes without a row stand at the last position; their weight is 0.
    std::fill(positions_.begin() + count, positions_.end(), positions_[count - 1]);
    for (int64_t lane = 0; lane < kLanes; ++lane) far_ends_[lane] = positions_[lane] - p_.window;
    sink_ends_.fill(start + p_.sinks - 1);
    min_m_ = positions_.front();
    max_m_ = positions_.back();
    pack_lanes(rows_.data(), count, p_.dim, queries_.data(), key_staging_.data());
    pack_lanes(index_rows_.data(), count, p_.index_dim, index_queries_.data(),
               transpose_staging_.data());
    for (auto* maximum : {&true_max_, &index_max_}) {
      maximum->fill(-std::numeric_limits<Accum>::infinity());
    }
    for (auto* sum : {&true_sum_, &index_sum_, &difference_}) sum->fill(0);
  }

  /// Every row sees every key of the tile, and through the index.
  bool plain(int64_t n) const {
    const int64_t last = n + kKeyTile - 1;
    return last <= min_m_ &&
           (!p_.beyond_window || (n >= start_ + p_.sinks && last <= min_m_ - p_.window));
  }

  Accum* true_tile(int64_t n) { return true_logits_.data() + (n - start_) * kLanes; }
  Accum* index_tile(int64_t n) { return index_logits_.data() + (n - start_) * kLanes; }

  void score(int64_t n) {
    const Operand<T> keys = key_tile(keys_, n, p_.dim, key_staging_.data());
    gemm<T>(kKeyTile, kLanes, p_.dim, keys.ptr, keys.stride, queries_.data(), kLanes, true_tile(n),
            kLanes, false);
    const Operand<Accum> index = key_tile(index_head_, n, p_.index_dim, index_staging_.data());
    gemm<Accum>(kKeyTile, kLanes, p_.index_dim, index.ptr, index.stride, index_queries_.data(),
                kLanes, index_tile(n), kLanes, false);
  }

  /// Which lanes see a key of the tile, and which of them by the true logits.
  struct Masks {
    Vec last_visible, last_far, last_sink;
    Vec visible(const Vec& key) const { return key <= last_visible; }
    Vec near(const Vec& key) const { return (key <= last_sink) | (key > last_far); }
  };

  Masks masks(int64_t n, int64_t lane) const {
    return {Vec::loadu(last_in_tile<Accum>(positions_, n).data() + lane),
            Vec::loadu(last_in_tile<Accum>(far_ends_, n).data() + lane),
            Vec::loadu(last_in_tile<Accum>(sink_ends_, n).data() + lane)};
  }

  /// Scales and masks a tile's logits and adds them to the running sums.
  template <bool kPlain>
  void accumulate(int64_t n) {
    const Vec hidden(-std::numeric_limits<Accum>::infinity());
    const Vec zero(Accum(0));
    const Vec scale(static_cast<Accum>(p_.scale));
    const Vec offset(offset_);
    for (int64_t lane = 0; lane < kLanes; lane += Vec::size()) {
      Accum* const trues = true_tile(n) + lane;
      Accum* const indexes = index_tile(n) + lane;
      [[maybe_unused]] const Masks mask = kPlain ? Masks{} : masks(n, lane);
      Vec true_max = hidden;
      Vec index_max = hidden;
      for (int64_t i = 0; i < kKeyTile; ++i) {
        Vec a = Vec::loadu(trues + i * kLanes) * scale;
        Vec b = Vec::loadu(indexes + i * kLanes) + offset;
        if constexpr (!kPlain) {
          const Vec key(static_cast<Accum>(i));
          const Vec visible = mask.visible(key);
          if (p_.beyond_window) b = choose(mask.near(key), a, b);
          a = choose(visible, a, hidden);
          b = choose(visible, b, hidden);
        }
        a.store(trues + i * kLanes);
        b.store(indexes + i * kLanes);
        true_max = at::vec::maximum(true_max, a);
        index_max = at::vec::maximum(index_max, b);
      }
      const Vec true_shift = raise(true_max, lane, true_max_, {&true_sum_, &difference_});
      const Vec index_shift = raise(index_max, lane, index_max_, {&index_sum_});
      Vec true_sum = Vec::loadu(true_sum_.data() + lane);
      Vec index_sum = Vec::loadu(index_sum_.data() + lane);
      Vec difference = Vec::loadu(difference_.data() + lane);
      for (int64_t i = 0; i < kKeyTile; ++i) {
        const Vec a = Vec::loadu(trues + i * kLanes);
        const Vec b = Vec::loadu(indexes + i * kLanes);
        const Vec weight = fast_exp(a - true_shift);
        Vec gap = a - b;
        if constexpr (!kPlain) gap = choose(mask.visible(Vec(static_cast<Accum>(i))), gap, zero);
        true_sum = true_sum + weight;
        index_sum = index_sum + fast_exp(b - index_shift);
        difference = at::vec::fmadd(weight, gap, difference);
      }
      true_sum.store(true_sum_.data() + lane);
      index_sum.store(index_sum_.data() + lane);
      difference.store(difference_.data() + lane);
    }
  }

  /// Raises the running maxima of some lanes, shrinks the sums that refer to them, and returns what
  /// exponents subtract from now on.
  Vec raise(const Vec& tile_max, int64_t lane, Lanes<Accum>& maxima,
            std::initializer_list<Lanes<Accum>*> sums) {
    Lanes<Accum> shift;
    at::vec::maximum(Vec::loadu(maxima.data() + lane), tile_max).store(shift.data());
    for (int64_t i = 0; i < Vec::size(); ++i) {
      const Accum maximum = poison_infinity(shift[i]);
      shift[i] = finite_shift(maximum);
      const Accum decay = std::exp(maxima[lane + i] - shift[i]);
      for (Lanes<Accum>* sum : sums) (*sum)[lane + i] *= decay;
      maxima[lane + i] = maximum;
    }
    return Vec::loadu(shift.data());
  }

  void finish_rows(int64_t batch, int64_t j, const int64_t* rows, int64_t count) {
    auto* kl_rows = static_cast<Accum*>(p_.kl_rows_ptr) + (batch * p_.heads + j) * p_.rows;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      true_lse_[lane] = true_max_[lane] + std::log(true_sum_[lane]);
      index_lse_[lane] = index_max_[lane] + std::log(index_sum_[lane]);
      row_weight_[lane] = 0;
      if (lane >= count) continue;
      const Accum kl = difference_[lane] / true_sum_[lane] - true_lse_[lane] + index_lse_[lane];
      kl_rows[rows[lane]] = kl;
      row_weight_[lane] = std::isnan(kl) ? kl : weight_;
    }
  }

  /// Turns a tile's index logits into gradients of the mean KL by them, a_index - a_full.
  template <bool kPlain>
  void differentiate(int64_t n) {
    const Vec zero(Accum(0));
    for (int64_t lane = 0; lane < kLanes; lane += Vec::size()) {
      const Accum* const trues = true_tile(n) + lane;
      Accum* const indexes = index_tile(n) + lane;
      [[maybe_unused]] const Masks mask = kPlain ? Masks{} : masks(n, lane);
      const Vec true_lse = Vec::loadu(true_lse_.data() + lane);
      const Vec index_lse = Vec::loadu(index_lse_.data() + lane);
      const Vec weight = Vec::loadu(row_weight_.data() + lane);
      Vec sum = Vec::loadu(grad_offset_.data() + lane);
      for (int64_t i = 0; i < kKeyTile; ++i) {
        Vec grad = (fast_exp(Vec::loadu(indexes + i * kLanes) - index_lse) -
                    fast_exp(Vec::loadu(trues + i * kLanes) - true_lse)) *
                   weight;
        if constexpr (!kPlain) {
          const Vec key(static_cast<Accum>(i));
          if (p_.beyond_window) grad = choose(mask.near(key), zero, grad);
          grad = choose(mask.visible(key), grad, zero);
        }
        grad.store(indexes + i * kLanes);
        sum = sum + grad;
      }
      sum.store(grad_offset_.data() + lane);
    }
  }

  void multiply_gradients(int64_t n, Accum* grad_k) {
    const int64_t count = std::min(kKeyTile, p_.keys - n);
    const Accum* grad = index_tile(n);
    Accum* target = grad_k + n * p_.index_dim;
    const bool whole = count == kKeyTile;
    gemm<Accum>(kKeyTile, p_.index_dim, kLanes, grad, kLanes, index_rows_.data(), p_.index_dim,
                whole ? target : grad_keys_.data(), p_.index_dim, whole);
    for (int64_t i = 0; !whole && i < count * p_.index_dim; ++i) target[i] += grad_keys_[i];

    const Operand<Accum> index = key_tile(index_head_, n, p_.index_dim, index_staging_.data());
    pack_transposed([&](int64_t i) { return index.ptr + i * index.stride; }, kKeyTile, p_.index_dim,
                    index_keys_.data(), kKeyTile, transpose_staging_.data());
    gemm<Accum>(p_.index_dim, kLanes, kKeyTile, index_keys_.data(), kKeyTile, grad, kLanes,
                grad_queries_.data(), kLanes, true);
  }

  void store_grad_q(int64_t batch, int64_t j, const int64_t* rows, int64_t count) {
    auto* grad_q =
        static_cast<Accum*>(p_.grad_q_ptr) + (batch * p_.heads + j) * p_.rows * p_.index_dim;
    for (int64_t lane = 0; lane < count; ++lane) {
      for (int64_t d = 0; d < p_.index_dim; ++d) {
        grad_q[rows[lane] * p_.index_dim + d] = grad_queries_[d * kLanes + lane] * index_scale_;
      }
    }
  }

  const IndexKlParams& p_;
  const Accum weight_;
  const Accum index_scale_;
  std::vector<T> rows_, queries_, key_staging_;
  std::vector<Accum> index_rows_, index_queries_, index_staging_, index_keys_, transpose_staging_;
  std::vector<Accum> grad_keys_, grad_queries_;
  std::vector<Accum> true_logits_, index_logits_;  // [keys, kLanes]
  std::array<int64_t, kLanes> positions_, far_ends_, sink_ends_;
  Lanes<Accum> true_max_, index_max_, true_sum_, index_sum_, difference_;
  Lanes<Accum> true_lse_, index_lse_, row_weight_, grad_offset_;
  HeadRows keys_{}, index_head_{};
  int64_t start_ = 0, min_m_ = 0, max_m_ = 0;
  Accum offset_ = 0;
};

template <typename T>
void index_kl(const IndexKlParams& p) {
  using Accum = at::opmath_type<T>;
  std::vector<std::vector<int64_t>> rows(p.batch);
  std::vector<int64_t> starts(p.batch);
  int64_t valid = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    starts[b] = p.start_ptr ? std::max<int64_t>(0, p.start_ptr[b]) : 0;
    rows[b] = valid_rows(p, b, starts[b]);
    valid += static_cast<int64_t>(rows[b].size());
  }
  const int64_t units = p.batch * p.heads;
  if (units == 0) return;
  // A part takes every parts-th block of a head and has its own grad_k: no atomics, fixed order.
  const int64_t blocks = (p.rows + kLanes - 1) / kLanes;
  const int64_t parts = std::clamp<int64_t>(kMinTasks / units, 1, std::max<int64_t>(1, blocks));
  const int64_t grad_size = p.keys * p.index_dim;
  auto* grad_k = static_cast<Accum*>(p.grad_k_ptr);
  std::vector<Accum> partial((parts - 1) * units * grad_size);
  std::vector<double> grad_offset(units * parts);
  const auto part_grad = [&](int64_t unit, int64_t part) {
    return part == 0 ? grad_k + unit * grad_size
                     : partial.data() + ((part - 1) * units + unit) * grad_size;
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(
      0, std::min<int64_t>(at::get_num_threads(), units * parts), 1, [&](int64_t, int64_t) {
        BlockWorker<T> worker(p, valid);
        for (int64_t task = next++; task < units * parts; task = next++) {
          const int64_t unit = task / parts;
          const int64_t b = unit / p.heads;
          const auto count = static_cast<int64_t>(rows[b].size());
          for (int64_t first = task % parts * kLanes; first < count; first += parts * kLanes) {
            grad_offset[task] +=
                worker.run(b, unit % p.heads, starts[b], rows[b].data() + first,
                           std::min(kLanes, count - first), part_grad(unit, task % parts));
          }
        }
        gemm_release<Accum>();
        gemm_release<T>();
      });
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      for (int64_t part = 1; part < parts; ++part) {
        const Accum* more = part_grad(unit, part);
        Accum* sum = part_grad(unit, 0);
        for (int64_t i = 0; i < grad_size; ++i) sum[i] += more[i];
      }
    }
  });
  const auto* kl_rows = static_cast<const Accum*>(p.kl_rows_ptr);
  for (int64_t j = 0; j < p.heads; ++j) {
    double kl = 0;
    double offset = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t unit = b * p.heads + j;
      for (const int64_t row : rows[b]) kl += kl_rows[unit * p.rows + row];
      for (int64_t part = 0; part < parts; ++part) offset += grad_offset[unit * parts + part];
    }
    static_cast<Accum*>(p.kl_ptr)[j] = static_cast<Accum>(kl / std::max<int64_t>(1, valid));
    static_cast<Accum*>(p.grad_offset_ptr)[j] = static_cast<Accum>(offset);
  }
}

}  // namespace

void index_kl_kernel(const IndexKlParams& params) {
  if (params.accum == at::kDouble) return index_kl<double>(params);
  if (params.dtype == at::kBFloat16 && has_brgemm<at::BFloat16>()) {
    return index_kl<at::BFloat16>(params);
  }
  index_kl<float>(params);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
