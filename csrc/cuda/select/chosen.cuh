#pragma once
// What a team decided, and which members are in by it.

#include "csrc/cuda/select/cut.cuh"

namespace rtpurbo::cuda {

/// What a team found out about its problem.
struct Selection {
  bool everything;  // every candidate is in: p is 1, a score is NaN or infinite, or there is none
  bool poisoned;
  float top;  // the largest score
  Cut cut;

  /// Mass of what is in and of the near keys, as a share of all.
  __device__ float mass() const {
    if (poisoned) return NAN;
    return everything ? 1.0f : static_cast<float>(fmin(1.0, cut.mass / cut.total));
  }
};

/// Calls fn(i, in) with bit e of `in` set when member i + e of this warp is in, i a multiple of 4;
/// by all lanes, for members [0, end). fn may overwrite scores of members up to i's step of 128.
template <typename Fn>
__device__ __forceinline__ void for_each_chosen(const Selection& selection, const Members& members,
                                                int end, const Fn& fn) {
  for_each_four(members, 0, end, [&](int i, const float(&scores)[4]) {
    uint32_t in = 0, ties = 0;
    bool some = false;
#pragma unroll
    for (const float score : scores) some |= !(score < selection.cut.score);  // a NaN is in
    if (some && selection.cut.whole) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int bin = Bin(bins_below(selection.top, scores[e])).number;
        in |= static_cast<uint32_t>(bin <= selection.cut.bin) << e;
      }
    } else if (some) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        in |= static_cast<uint32_t>(!(scores[e] <= selection.cut.score)) << e;
        ties |= static_cast<uint32_t>(scores[e] == selection.cut.score) << e;
      }
      if (ties && !selection.everything) {
#pragma unroll 1
        for (int e = 0; e < 4; ++e) {
          if (ties >> e & 1 && i + e < members.count()) {
            in |= (members.position(i + e) <= selection.cut.index) << e;
          }
        }
      }
    }
    fn(i, in);
  });
}

/// Sets the bits of the keys of members i to i + 3; every lane is there.
__device__ __forceinline__ void mark_chosen(const Members& members, int i, uint32_t in,
                                            int block_size, uint64_t* selected) {
  if (members.sifted()) {
    uint32_t* words = reinterpret_cast<uint32_t*>(selected);
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      if (!(in >> e & 1)) continue;
      const int32_t key = members.position(i + e);
      atomicOr(&words[key / 32], 1u << key % 32);
    }
    return;
  }
  uint8_t* bytes = reinterpret_cast<uint8_t*>(selected);
  if (block_size == 1) {
    const uint32_t next = __shfl_down_sync(0xffffffffu, in, 1);
    if (threadIdx.x % 2 == 0 && i < members.count()) {
      bytes[members.position(i) / 8] = static_cast<uint8_t>(in | next << 4);
    }
    return;
  }
#pragma unroll 1
  for (int e = 0; e < 4 && i + e < members.count(); ++e) {
    const int64_t first = static_cast<int64_t>(members.position(i + e)) * (block_size / 8);
    const uint8_t value = in >> e & 1 ? 0xff : 0;
#pragma unroll 1
    for (int b = 0; b < block_size / 8; ++b) bytes[first + b] = value;
  }
}

}  // namespace rtpurbo::cuda
