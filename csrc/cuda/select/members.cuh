#pragma once
// Which members a warp owns, and where it keeps their scores.

#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/ptx/prefetch.cuh"
#include "csrc/cuda/select/team.cuh"

namespace rtpurbo::cuda {

/// log2 of the members of a group of 64 keys.
__host__ __device__ __forceinline__ int group_shift(int64_t block_size) {
  return block_size == 1 ? 6 : block_size == 16 ? 2 : block_size == 32 ? 1 : 0;
}

/// log2 of the keys of a member.
__host__ __device__ __forceinline__ int member_shift(int64_t block_size) {
  return 6 - group_shift(block_size);
}

/// Members that a warp of a block has room for.
__host__ __device__ __forceinline__ int warp_room(int warp_groups, int64_t block_size) {
  return ((warp_groups << group_shift(block_size)) + 3) / 4 * 4;
}

/// Runs of groups of 64 keys go to the blocks of a team in turn, so that selected keys, which are
/// often neighbours, are spread over all of them, and to their warps.
class Members {
 public:
  /// `scores` has room for the block, on 16 bytes; twice as much where members are sifted.
  __device__ Members(const SelectParams& p, const SelectWorkspace& w, const Team& team,
                     float* scores, bool sifted = false)
      : stride_(team.size * kSelectWarps),
        shift_(group_shift(p.block_size)),
        run_shift_(w.run_shift),
        own_(static_cast<int>(threadIdx.x) / 32 * team.size + team.rank),
        room_(warp_room(w.warp_groups, p.block_size)),
        sifted_(sifted),
        place_(scores + static_cast<int64_t>(threadIdx.x / 32) * room_ * (sifted ? 2 : 1)),
        scores_(place_),
        in_global_(w.scores != nullptr) {}

  /// Takes the groups that hold the keys [begin, end).
  __device__ void take(int64_t begin, int64_t end) {
    first_group_ = static_cast<int>(begin / kGroupKeys);
    end_group_ = end > begin ? static_cast<int>((end + kGroupKeys - 1) / kGroupKeys) : first_group_;
    groups_ = groups_before(end_group_);
  }

  /// Whether only members that keep() took are there, with positions of their own.
  __device__ bool sifted() const { return sifted_; }

  /// Forgets all but the first `kept` of this lane.
  __device__ void keep_only(int kept) {
    scores_ = place_;
    in_global_ = true;
    next_ = &score(static_cast<int>(threadIdx.x) % 32 + kept * 32);
  }

  /// One more of this lane. After the last comes keep_end(), after which there may be more.
  __device__ void keep(float score, int32_t position) {
    next_[0] = score;
    next_[kPositions] = __int_as_float(position);
    next_ += 2 * kPositions;
  }
  __device__ int kept() const { return static_cast<int>(next_ - place_) / (2 * kPositions); }

  /// Lanes that kept less than others get members that are out.
  __device__ void keep_end() {
    const int own = kept(), most = __reduce_max_sync(0xffffffffu, own);
    for (int j = own; j < most; ++j) keep(-INFINITY, 0);
    keep_only(own);
    kept_in_all_ = most * 32;
    __syncwarp();
  }

  /// Copies what is kept to shared memory, if `bytes` for the block are enough.
  __device__ void bring(char* shared, int bytes) {
    float* to = room_in(shared, bytes);
    if (!to) return;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % 32 * 4; i < 2 * kept_in_all_; i += 128) {
      ptx::cp_async_16(&to[i], &scores_[i]);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    scores_ = to;
    in_global_ = false;
  }

  /// Makes room for `rows` of 32 members in the place of what was kept, in shared memory if `bytes`
  /// for the block are enough.
  __device__ void make_room(int rows, char* shared, int bytes) {
    kept_in_all_ = rows * 32;
    float* to = room_in(shared, bytes);
    scores_ = to ? to : place_;
    in_global_ = to == nullptr;
  }
  __device__ void put(int i, float score, int32_t position) {
    float* own = &this->score(i);
    own[0] = score;
    own[kPositions] = __int_as_float(position);
  }

  /// Groups of this warp, and its members.
  __device__ int groups() const { return groups_; }
  __device__ int of_group() const { return 1 << shift_; }
  __device__ int count() const { return sifted_ ? kept_in_all_ : groups_ << shift_; }

  /// Groups of this warp whose number in the row is below `number`.
  __device__ int groups_before(int number) const {
    const int run = 1 << run_shift_, round = stride_ << run_shift_;
    const auto before =
        static_cast<unsigned>(min(max(number, first_group_), end_group_) - first_group_);
    const auto rounds = static_cast<int>(before / static_cast<unsigned>(round));
    const int rest = static_cast<int>(before) - rounds * round - (own_ << run_shift_);
    return (rounds << run_shift_) + min(max(rest, 0), run);
  }

  /// Number in the row of this warp's group `i`.
  __device__ int group(int i) const {
    const int run = (i >> run_shift_) * stride_ + own_;
    return first_group_ + (run << run_shift_) + (i & ((1 << run_shift_) - 1));
  }

  /// Position in the row of this warp's member `i`.
  __device__ int32_t position(int i) const {
    if (sifted_) return __float_as_int((&score(i))[kPositions]);
    return (group(i >> shift_) << shift_) + (i & (of_group() - 1));
  }

  /// The same of members `i` to `i + 3`, `i` a multiple of 4.
  __device__ int4 four_positions(int i) const {
    if (sifted_ && i >= count()) return {};
    if (sifted_) return reinterpret_cast<const int4&>((&score(i))[kPositions]);
    if (shift_ < 2)
      return make_int4(position(i), position(i + 1), position(i + 2), position(i + 3));
    const int32_t first = position(i);
    return make_int4(first, first + 1, first + 2, first + 3);
  }

  __device__ float& score(int i) const {
    const int place = sifted_ ? i + (i & -kPositions) : i;
    return *ptx::offset_by(scores_, place, static_cast<int>(sizeof(float)));
  }

  /// The scores of this warp's members `i` to `i + 3`, -inf beyond the last; `i` a multiple of 4.
  __device__ float4 four(int i) const {
    constexpr float kNone = -INFINITY;
    if (i >= count()) return make_float4(kNone, kNone, kNone, kNone);
    float4 scores = reinterpret_cast<const float4&>(score(i));
    if (i + 4 > count()) {
      scores.w = kNone;
      if (i + 3 > count()) scores.z = kNone;
      if (i + 2 > count()) scores.y = kNone;
    }
    return scores;
  }

  /// Begins to load the scores that four(i) will want some steps later, where they are far away.
  __device__ void prefetch(int i) const {
    constexpr int kAhead = 6 * 128;
    if (in_global_ && i + kAhead < count()) ptx::prefetch_to_l2(&score(i + kAhead));
  }

 private:
  static constexpr int kPositions = 32;  // of sifted members, after as many scores

  /// The warp's part of shared memory, or null if what it kept does not fit.
  __device__ float* room_in(char* shared, int bytes) const {
    const int of_warp = bytes / kSelectWarps / 16 * 4;  // scores and positions
    if (2 * kept_in_all_ > of_warp) return nullptr;
    return reinterpret_cast<float*>(shared) + static_cast<int>(threadIdx.x) / 32 * of_warp;
  }

  const int stride_, shift_, run_shift_, own_, room_;
  const bool sifted_;
  float* const place_;  // where scores go
  float* scores_;       // where they are
  bool in_global_;
  int first_group_ = 0, end_group_ = 0;  // of the team
  int groups_ = 0;
  int kept_in_all_ = 0;  // by this warp, and what fills up
  float* next_;          // for the score that the lane keeps
};

/// Calls fn(i, scores) with scores[e] of member i + e of this warp, by all lanes; those of
/// [begin, end), both multiples of 128 or the end, and -inf beyond. A step's scores are loaded
/// before fn may overwrite them.
template <typename Fn>
__device__ __forceinline__ void for_each_four(const Members& members, int begin, int end,
                                              const Fn& fn) {
#pragma unroll 1
  for (int base = begin; base < end; base += 128) {
    const int first = base + static_cast<int>(threadIdx.x) % 32 * 4;
    const float4 loaded = members.four(first);
    members.prefetch(first);
    __syncwarp();
    const float scores[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    fn(first, scores);
  }
}

}  // namespace rtpurbo::cuda
