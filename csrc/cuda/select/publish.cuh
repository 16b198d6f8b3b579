#pragma once
// Stage 4: the members of the bin that is cut, for the whole team.

#include "csrc/cuda/select/cut.cuh"

namespace rtpurbo::cuda {

/// This block's members of the cut bin, for the team to read.
class Publish {
 public:
  struct Shared {
    int count;
  };

  static __device__ void run(const Members& members, float top, int bin, Member* cut_members,
                             int32_t* cut_count, Shared& shared) {
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    const BinRange range(top, bin);
    for_each_four(members, 0, members.count(), [&](int i, const float(&scores)[4]) {
      bool some = false;
#pragma unroll
      for (const float score : scores) some |= range.holds(score);
      if (!some) return;
      uint32_t in = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool of_bin = scores[e] != -INFINITY && Bin(bins_below(top, scores[e])).number == bin;
        in |= static_cast<uint32_t>(of_bin) << e;
      }
      if (in == 0) return;
      const int4 positions = members.four_positions(i);
      const int32_t position[4] = {positions.x, positions.y, positions.z, positions.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (in >> e & 1) {
          cut_members[atomicAdd(&shared.count, 1)] = {ordered_key(scores[e]), position[e]};
        }
      }
    });
    __syncthreads();
    if (threadIdx.x == 0) *cut_count = shared.count;
  }
};

/// Members of the cut bin that all blocks of the team published.
class Published {
 public:
  __device__ Published(const Member* members, const int32_t* counts, int64_t stride, int blocks)
      : members_(members), counts_(counts), stride_(stride), blocks_(blocks) {}

  __device__ int blocks() const { return blocks_; }
  __device__ int count_of(int block) const { return __ldcg(&counts_[block]); }

  __device__ Member load(int block, int i) const {
    const uint2 loaded = __ldcg(reinterpret_cast<const uint2*>(members_ + block * stride_) + i);
    return {loaded.x, static_cast<int32_t>(loaded.y)};
  }

  /// Calls fn(member) once for each, from some thread.
  template <typename Fn>
  __device__ void for_each(const Fn& fn) const {
    for (int block = threadIdx.x / 32; block < blocks_; block += kSelectWarps) {
      const int count = count_of(block);
      for (int i = threadIdx.x % 32; i < count; i += 32) fn(load(block, i));
    }
  }

 private:
  const Member* const members_;
  const int32_t* const counts_;
  const int64_t stride_;
  const int blocks_;
};

}  // namespace rtpurbo::cuda
