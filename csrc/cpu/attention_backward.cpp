#include "csrc/cpu/attention_backward.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "csrc/cpu/attention_tile.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/jobs.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/softmax.h"

// With P = exp(scale Q K^T - lse) and delta = rowsum(dO * O):
//   dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q.
// Two passes recompute P: one over query tiles for dQ, one over key blocks for dK and dV, so that
// no two threads add to the same rows and the bits repeat.

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

/// lse as the exponent's shift: rows that see nothing get +inf, whose weights are 0.
template <typename Accum>
void load_lse(const AttentionParams& params, const Tile& tile, std::vector<Accum>& lse) {
  load_row_values(static_cast<const Accum*>(params.lse_ptr), params.lse_heads, params.rows, tile,
                  tile.set->heads, lse.data());
  for (Accum& value : lse) {
    if (value == -std::numeric_limits<Accum>::infinity()) value = -value;
  }
}

/// weights = exp(scale * weights - lse), grads = weights * (grads - delta), over `size` columns, a
/// multiple of 32. lse and delta are one value a row, or one a column.
template <bool kPerColumn, typename Accum>
void weigh_row(Accum* weights, Accum* grads, int64_t size, Accum scale, const Accum* lse,
               const Accum* delta) {
  using Vec = at::vec::Vectorized<Accum>;
  const Vec factor(scale);
  for (int64_t i = 0; i < size; i += Vec::size()) {
    const Vec shift = kPerColumn ? Vec::loadu(lse + i) : Vec(*lse);
    const Vec offset = kPerColumn ? Vec::loadu(delta + i) : Vec(*delta);
    const Vec weight = fast_exp(at::vec::fmsub(Vec::loadu(weights + i), factor, shift));
    weight.store(weights + i);
    (weight * (Vec::loadu(grads + i) - offset)).store(grads + i);
  }
}

/// delta = rowsum(dO * O) for every row.
template <typename S>
void compute_delta(const AttentionBackwardParams& params) {
  using Accum = at::opmath_type<S>;
  const AttentionParams& p = params.forward;
  auto* delta = static_cast<Accum*>(params.delta_ptr);
  at::parallel_for(0, p.batch * p.lse_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const S* out = head_rows<const S>(p.out, job / p.lse_heads, job % p.lse_heads);
      const S* grad = head_rows<const S>(params.grad_out, job / p.lse_heads, job % p.lse_heads);
      for (int64_t i = 0; i < p.rows; ++i) {
        Accum sum = 0;
        for (int64_t d = 0; d < p.dim; ++d) {
          sum += static_cast<Accum>(out[i * p.out.row_stride + d]) *
                 static_cast<Accum>(grad[i * params.grad_out.row_stride + d]);
        }
        delta[job * p.rows + i] = sum;
      }
    }
  });
}

/// dQ of one tile at a time.
template <typename S>
class QueryGradWorker {
  using Accum = at::opmath_type<S>;

 public:
  explicit QueryGradWorker(const AttentionBackwardParams& params)
      : params_(params), p_(params.forward) {
    const int64_t rows = max_tile_rows(p_);
    for (auto* buffer : {&queries_, &grad_out_, &grad_q_}) buffer->resize(rows * p_.dim);
    for (auto* buffer : {&keys_, &keys_transposed_, &values_transposed_}) {
      buffer->resize(kTileKeys * p_.dim);
    }
    staging_.resize(kPackedGroup * p_.dim);
    for (auto* buffer : {&weights_, &grads_}) buffer->resize(rows * kTileKeys);
    for (auto* buffer : {&lse_, &delta_}) buffer->resize(rows);
  }

  void run(const Tile& tile) {
    load_rows<S>(p_.q, tile, p_.dim, queries_);
    load_rows<S>(params_.grad_out, tile, p_.dim, grad_out_);
    load_lse(p_, tile, lse_);
    load_row_values(static_cast<const Accum*>(params_.delta_ptr), p_.lse_heads, p_.rows, tile,
                    tile.set->heads, delta_.data());
    const int64_t rows = round_up(tile.rows(), kTilePadding);
    std::fill_n(grad_q_.data(), rows * p_.dim, Accum(0));
    tile_runs(p_, tile, 0, std::numeric_limits<int64_t>::max(), runs_);
    blocks_.reset(runs_);
    while (blocks_.next()) add_block(tile, rows);
    for_each_row<S>(params_.grad_q, tile, [&](S* row, int64_t stacked) {
      scale_row(grad_q_.data() + stacked * p_.dim, static_cast<Accum>(p_.scale), row, p_.dim);
    });
  }

 private:
  void add_block(const Tile& tile, int64_t rows) {
    const int64_t columns = blocks_.padded_columns();
    const S* keys = head_rows<const S>(p_.k, tile.batch, tile.set->kv_head);
    const S* values = head_rows<const S>(p_.v, tile.batch, tile.set->kv_head);
    const auto key = [&](int64_t i) { return keys + blocks_.position(i) * p_.k.row_stride; };
    const auto value = [&](int64_t i) { return values + blocks_.position(i) * p_.v.row_stride; };
    pack_transposed(key, blocks_.columns(), p_.dim, keys_transposed_.data(), kTileKeys,
                    staging_.data());
    pack_transposed(value, blocks_.columns(), p_.dim, values_transposed_.data(), kTileKeys,
                    staging_.data());
    pack_rows(key, blocks_.columns(), columns, p_.dim, keys_.data());
    gemm(rows, columns, p_.dim, queries_.data(), p_.dim, keys_transposed_.data(), kTileKeys,
         weights_.data(), kTileKeys, false);
    gemm(rows, columns, p_.dim, grad_out_.data(), p_.dim, values_transposed_.data(), kTileKeys,
         grads_.data(), kTileKeys, false);
    const int64_t first_m = first_position(p_, tile);
    for (int64_t row = 0; row < tile.rows(); ++row) {
      Accum* weights = weights_.data() + row * kTileKeys;
      blocks_.hide(first_m + row % tile.height(), p_.window, weights);
      weigh_row<false>(weights, grads_.data() + row * kTileKeys, columns,
                       static_cast<Accum>(p_.scale), &lse_[row], &delta_[row]);
    }
    gemm(rows, p_.dim, columns, grads_.data(), kTileKeys, keys_.data(), p_.dim, grad_q_.data(),
         p_.dim, true);
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  std::vector<Accum> queries_, grad_out_, grad_q_, keys_, keys_transposed_, values_transposed_,
      staging_, weights_, grads_, lse_, delta_;
  std::vector<Run> runs_;
  KeyBlocks blocks_;
};

/// Keys [begin, end) of one KV head of one sequence.
struct KeyBlock {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
};

/// dK and dV of one key block at a time. Keys are rows here and the tile's query rows columns.
template <typename S>
class KeyGradWorker {
  using Accum = at::opmath_type<S>;

 public:
  explicit KeyGradWorker(const AttentionBackwardParams& params)
      : params_(params), p_(params.forward), columns_(max_tile_rows(p_)) {
    for (auto* buffer : {&keys_, &values_, &grad_k_, &grad_v_}) buffer->resize(kTileKeys * p_.dim);
    for (auto* buffer : {&queries_, &queries_transposed_, &grad_out_, &grad_out_transposed_}) {
      buffer->resize(columns_ * p_.dim);
    }
    staging_.resize(kPackedGroup * p_.dim);
    for (auto* buffer : {&weights_, &grads_}) buffer->resize(kTileKeys * columns_);
    for (auto* buffer : {&lse_, &delta_}) buffer->resize(columns_);
  }

  /// `tiles` are those of the block's sequence and KV head.
  void run(const KeyBlock& block, const std::vector<Tile>& tiles) {
    const S* keys = head_rows<const S>(p_.k, block.batch, block.kv_head);
    const S* values = head_rows<const S>(p_.v, block.batch, block.kv_head);
    const int64_t count = block.end - block.begin;
    const auto key = [&](int64_t i) { return keys + (block.begin + i) * p_.k.row_stride; };
    const auto value = [&](int64_t i) { return values + (block.begin + i) * p_.v.row_stride; };
    pack_rows(key, count, kTileKeys, p_.dim, keys_.data());
    pack_rows(value, count, kTileKeys, p_.dim, values_.data());
    std::fill(grad_k_.begin(), grad_k_.end(), Accum(0));
    std::fill(grad_v_.begin(), grad_v_.end(), Accum(0));
    for (const Tile& tile : tiles) {
      if (first_position(p_, tile) + tile.height() <= block.begin) continue;
      tile_runs(p_, tile, block.begin, block.end, runs_);
      if (!runs_.empty()) add_tile(block, tile);
    }
    S* grad_k = head_rows<S>(params_.grad_k, block.batch, block.kv_head);
    S* grad_v = head_rows<S>(params_.grad_v, block.batch, block.kv_head);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = block.begin + i;
      scale_row(grad_k_.data() + i * p_.dim, static_cast<Accum>(p_.scale),
                grad_k + n * params_.grad_k.row_stride, p_.dim);
      copy_row(grad_v_.data() + i * p_.dim, grad_v + n * params_.grad_v.row_stride, p_.dim);
    }
  }

 private:
  void load_tile(const Tile& tile) {
    load_rows<S>(p_.q, tile, p_.dim, queries_);
    load_rows<S>(params_.grad_out, tile, p_.dim, grad_out_);
    const int64_t rows = round_up(tile.rows(), kTilePadding);
    pack_transposed([&](int64_t i) { return queries_.data() + i * p_.dim; }, rows, p_.dim,
                    queries_transposed_.data(), columns_, staging_.data());
    pack_transposed([&](int64_t i) { return grad_out_.data() + i * p_.dim; }, rows, p_.dim,
                    grad_out_transposed_.data(), columns_, staging_.data());
    load_lse(p_, tile, lse_);
    load_row_values(static_cast<const Accum*>(params_.delta_ptr), p_.lse_heads, p_.rows, tile,
                    tile.set->heads, delta_.data());
  }

  void add_tile(const KeyBlock& block, const Tile& tile) {
    load_tile(tile);
    const int64_t columns = round_up(tile.rows(), kTilePadding);
    const int64_t first = (runs_.front().begin - block.begin) / kTilePadding * kTilePadding;
    const int64_t last = round_up(runs_.back().end - block.begin, kTilePadding);
    const int64_t count = last - first;
    gemm(count, columns, p_.dim, keys_.data() + first * p_.dim, p_.dim, queries_transposed_.data(),
         columns_, weights_.data(), columns_, false);
    gemm(count, columns, p_.dim, values_.data() + first * p_.dim, p_.dim,
         grad_out_transposed_.data(), columns_, grads_.data(), columns_, false);
    size_t run = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = block.begin + first + i;
      while (run < runs_.size() && n >= runs_[run].end) ++run;
      Accum* weights = weights_.data() + i * columns_;
      Accum* grads = grads_.data() + i * columns_;
      if (run == runs_.size() || n < runs_[run].begin) {  // no row sees it, whatever it holds
        std::fill_n(weights, columns, Accum(0));
        std::fill_n(grads, columns, Accum(0));
        continue;
      }
      hide(tile, n, runs_[run], columns, weights);
      weigh_row<true>(weights, grads, columns, static_cast<Accum>(p_.scale), lse_.data(),
                      delta_.data());
    }
    gemm(count, p_.dim, columns, weights_.data(), columns_, grad_out_.data(), p_.dim,
         grad_v_.data() + first * p_.dim, p_.dim, true);
    gemm(count, p_.dim, columns, grads_.data(), columns_, queries_.data(), p_.dim,
         grad_k_.data() + first * p_.dim, p_.dim, true);
  }

  /// -inf for the query rows that do not see key n, which lies in `run`.
  void hide(const Tile& tile, int64_t n, const Run& run, int64_t columns, Accum* scores) const {
    constexpr Accum kHidden = -std::numeric_limits<Accum>::infinity();
    const int64_t height = tile.height();
    const int64_t ahead = n - first_position(p_, tile);  // of the first row
    const int64_t first = std::clamp(ahead, int64_t{0}, height);
    const int64_t last = run.windowed ? std::clamp(ahead + p_.window, first, height) : height;
    for (int64_t top = 0; top < tile.rows(); top += height) {
      std::fill(scores + top, scores + top + first, kHidden);
      std::fill(scores + top + last, scores + top + height, kHidden);
    }
    std::fill(scores + tile.rows(), scores + columns, kHidden);
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const int64_t columns_;
  std::vector<Accum> keys_, values_, grad_k_, grad_v_, queries_, queries_transposed_, grad_out_,
      grad_out_transposed_, staging_, weights_, grads_, lse_, delta_;
  std::vector<Run> runs_;
};

template <typename S>
void backward(const AttentionBackwardParams& params, int64_t kv_heads) {
  const AttentionParams& p = params.forward;
  compute_delta<S>(params);
  const std::vector<Tile> query_tiles = make_tiles(p);
  run_jobs(query_tiles.size(), mask_work(p), [&](const auto& next) {
    QueryGradWorker<S> worker(params);
    for (int64_t i; (i = next()) >= 0;) worker.run(query_tiles[i]);
    gemm_release<at::opmath_type<S>>();
  });

  std::vector<std::vector<Tile>> tiles(p.batch * kv_heads);
  std::vector<KeyBlock> blocks;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (const HeadSet& set : *p.head_sets) {
      append_tiles(p, b, set, tiles[b * kv_heads + set.kv_head]);
    }
  }
  for (int64_t begin = 0; begin < p.keys; begin += kTileKeys) {
    for (int64_t head = 0; head < p.batch * kv_heads; ++head) {
      blocks.push_back(
          {head / kv_heads, head % kv_heads, begin, std::min(begin + kTileKeys, p.keys)});
    }
  }
  run_jobs(blocks.size(), mask_work(p), [&](const auto& next) {
    KeyGradWorker<S> worker(params);
    for (int64_t i; (i = next()) >= 0;) {
      const KeyBlock& block = blocks[i];
      worker.run(block, tiles[block.batch * kv_heads + block.kv_head]);
    }
    gemm_release<at::opmath_type<S>>();
  });
}

}  // namespace

void attention_backward_kernel(const AttentionBackwardParams& params) {
  int64_t kv_heads = 0;
  for (const HeadSet& set : *params.forward.head_sets) {
    kv_heads = std::max(kv_heads, set.kv_head + 1);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, params.forward.dtype,
                                  "attention_backward",
                                  [&] { backward<scalar_t>(params, kv_heads); });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
