#pragma once
// Stage 4, a thread block a tile: forced blocks, and by decreasing weight as many others as the
// threshold and the floor ask for. The weight of the last one in is found by trial over the bits of
// a float, three at a time: that takes no sorting and no room.

#include "csrc/cuda/select_tiles/block_reduce.cuh"
#include "csrc/cuda/select_tiles/problem.cuh"

namespace rtpurbo::cuda::tiles {

/// Candidates that are in: those whose weight has bits of at least `least`, and of those with one
/// bit less the first `ties`.
struct Cut {
  uint32_t least;
  int ties;
  int count;  // of both
  float share;
};

constexpr int kChooseThreads = 256;

class Chooser {
  static constexpr int kThreads = kChooseThreads;

 public:
  using Reduce = BlockReduce<kThreads>;

  /// `candidates` has room for the weights of that many, or is null.
  __device__ Chooser(const SelectTilesParams& p, const Workspace& w, int64_t slot,
                     Reduce::Shared& shared, float* candidates)
      : p_(p),
        tile_(tile_of(p, w, slot)),
        visible_(tile_.visible_blocks()),
        far_(tile_.far_blocks()),
        candidates_(tile_.candidates()),
        weights_(w.weights + slot * w.blocks),
        totals_(w.totals + w.row(slot, 0)),
        near_lse_(w.near_lse + w.row(slot, 0)),
        reduce_(shared),
        kept_(candidates) {}

  __device__ void run() {
    const int64_t place = (tile_.batch * p_.heads + tile_.head) * p_.all_tiles + tile_.number;
    indices_ = p_.indices_ptr + place * p_.capacity;
    if (tile_.empty()) return finish(place, 0, 0, 1.0f);
    keep_candidates();
    const float forced_share = forced();
    const int all = candidates_.end - candidates_.begin;
    const int forced_count = visible_.end - visible_.begin - all;
    // NaN or +inf somewhere makes the total of its row NaN, and so the near share.
    const bool poisoned = forced_share != forced_share;
    const Cut cut = poisoned ? Cut{0, 0, all, NAN} : find_cut(forced_share);
    const int count = forced_count + cut.count;
    const bool fits = count <= p_.capacity;
    if (fits) emit(cut);
    finish(place, fits ? count : -1, fits ? count : 0, forced_share + cut.share);
  }

 private:
  __device__ float weight(int block) const { return far_.has(block) ? weights_[block] : 0.0f; }
  /// Of a candidate's weight.
  __device__ uint32_t bits(int block) const {
    return __float_as_uint(kept_ ? kept_[block - candidates_.begin] : weight(block));
  }

  /// They are read again and again. A thread reads its own ones until a barrier has passed.
  __device__ void keep_candidates() {
    if (!kept_) return;
#pragma unroll 4
    for (int b = candidates_.begin + static_cast<int>(threadIdx.x); b < candidates_.end;
         b += kThreads) {
      kept_[b - candidates_.begin] = weight(b);
    }
  }

  /// Mean share of the near keys and of the forced blocks' far ones.
  __device__ float forced() {
    ShareCount own;
    for (int i = tile_.first + threadIdx.x; i <= tile_.last; i += kThreads) {
      own.share += fast_exp2(near_lse_[i] - totals_[i]);
    }
    const float near = reduce_.sum(own).share / static_cast<float>(tile_.rows());
    own = {};
    for (int b = visible_.begin + threadIdx.x; b < visible_.end; b += kThreads) {
      if (!candidates_.has(b)) own.share += weight(b);
    }
    return near + reduce_.sum(own).share;
  }

  __device__ ShareCount all_candidates() {
    ShareCount own;
#pragma unroll 4
    for (int b = candidates_.begin + threadIdx.x; b < candidates_.end; b += kThreads) {
      own.share += __uint_as_float(bits(b));
      ++own.count;
    }
    return reduce_.sum(own);
  }

  /// Of the candidates with bits in [in, out): shares and numbers of those from `in` + step, in + 2
  /// step, .. on.
  template <int kCount>
  __device__ void at_least(uint32_t in, uint32_t out, uint32_t step, ShareCount (&found)[kCount]) {
#pragma unroll
    for (ShareCount& f : found) f = {};
#pragma unroll 4
    for (int b = candidates_.begin + threadIdx.x; b < candidates_.end; b += kThreads) {
      const uint32_t own = bits(b);
      if (own - in >= out - in) continue;  // soon most
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (own - in < (i + 1) * step) continue;
        found[i].share += __uint_as_float(own);
        ++found[i].count;
      }
    }
    reduce_.sum(found);
  }

  __device__ Cut find_cut(float forced_share) {
    const float missing = p_.threshold_ptr[tile_.head] - forced_share;
    const auto enough = [&](const ShareCount& found) {
      return found.share >= missing && found.count >= p_.min_blocks;
    };
    if (enough({})) return {UINT32_MAX, 0, 0, 0.0f};
    // Candidates from the bits `in` on suffice, those from `out` on do not: shares are below 2.
    ShareCount found_in = all_candidates(), found_out;
    if (!enough(found_in)) return {0, 0, found_in.count, found_in.share};
    uint32_t in = 0, out = __float_as_uint(2.0f);
    // One candidate between the two is the last one in.
    while (out - in > 1 && found_in.count - found_out.count > 1) {
      constexpr int kWays = Reduce::kMost;
      const uint32_t step = max(1u, (out - in) / (kWays + 1));
      ShareCount found[kWays];
      at_least(in, out, step, found);
      const uint32_t first = in, end = out;
      const ShareCount above = found_out;
#pragma unroll
      for (int i = 0; i < kWays; ++i) {
        const uint32_t tried = first + (i + 1) * step;
        if (tried >= end) break;
        const ShareCount reached{above.share + found[i].share, above.count + found[i].count};
        if (!enough(reached)) {
          out = tried;
          found_out = reached;
          break;
        }
        in = tried;
        found_in = reached;
      }
    }
    if (found_in.count - found_out.count == 1) return {in, 0, found_in.count, found_in.share};
    return split_ties(in, found_in, found_out, missing);
  }

  /// As many of the equal weights with bits `in` as are needed.
  __device__ Cut split_ties(uint32_t in, const ShareCount& with, const ShareCount& without,
                            float missing) {
    const float weight = __uint_as_float(in);
    const int all = with.count - without.count;
    float needed = static_cast<float>(p_.min_blocks - without.count);
    if (without.share < missing) needed = fmaxf(needed, ceilf((missing - without.share) / weight));
    if (!(needed < static_cast<float>(all))) return {in, 0, with.count, with.share};
    const int ties = max(1, static_cast<int>(needed));
    return {in + 1, ties, without.count + ties, without.share + static_cast<float>(ties) * weight};
  }

  __device__ void emit(const Cut& cut) {
    int sure = 0, equal = 0;  // of the blocks before
    for (int first = visible_.begin; first < visible_.end; first += kThreads) {
      const int b = first + static_cast<int>(threadIdx.x);
      const bool visible = b < visible_.end;
      const bool candidate = candidates_.has(b);
      const bool in = visible && (!candidate || bits(b) >= cut.least);
      int added;
      int position = sure + reduce_.rank(in, added);
      sure += added;
      bool tie = false;
      if (cut.ties > 0) {
        tie = candidate && bits(b) == cut.least - 1;
        const int ahead = equal + reduce_.rank(tie, added);
        equal += added;
        tie = tie && ahead < cut.ties;
        position += min(ahead, cut.ties);
      }
      if (in || tie) indices_[position] = b;
    }
  }

  /// -1 behind the list.
  __device__ void finish(int64_t place, int count, int length, float mass) {
    for (int64_t i = length + threadIdx.x; i < p_.capacity; i += kThreads) indices_[i] = -1;
    if (threadIdx.x != 0) return;
    p_.counts_ptr[place] = count;
    p_.mass_ptr[place] = mass;
  }

  const SelectTilesParams& p_;
  const Tile tile_;
  const Range visible_, far_, candidates_;
  const float* weights_;
  const float* totals_;
  const float* near_lse_;
  Reduce reduce_;
  float* const kept_;
  int32_t* indices_ = nullptr;
};

__global__ __launch_bounds__(kChooseThreads) void choose_kernel(
    const __grid_constant__ SelectTilesParams p, const __grid_constant__ Workspace w,
    const bool keeps_weights) {
  __shared__ Chooser::Reduce::Shared shared;
  extern __shared__ float candidates[];
  Chooser(p, w, blockIdx.x, shared, keeps_weights ? candidates : nullptr).run();
}

}  // namespace rtpurbo::cuda::tiles
