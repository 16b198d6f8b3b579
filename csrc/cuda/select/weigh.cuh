#pragma once
// Stage 2: masses and counts of the team's members by bin of their log-weight. Masses are integers,
// so that their sums do not depend on the order.

#include "csrc/cuda/select/members.cuh"

namespace rtpurbo::cuda {

/// Masses in a bin are relative to the bin's upper edge, in units of 2^-17: 32 bits hold those of
/// kMostAtOnce members.
constexpr int kBinFraction = 17;
constexpr int kMostAtOnce = 32764;

/// The team clears its histograms, of which stages that weigh anew want one each.
template <int kHistograms>
__device__ __forceinline__ void clear_histograms(const SelectWorkspace& w, const Team& team) {
  for (int bin = team.rank * kSelectThreads + threadIdx.x; bin < kBins;
       bin += team.size * kSelectThreads) {
#pragma unroll
    for (int i = 0; i < kHistograms; ++i) {
      w.bin_mass[(i * w.teams + team.number) * kBins + bin] = 0;
      w.bin_count[(i * w.teams + team.number) * kBins + bin] = 0;
    }
  }
}

class Weigh {
  static constexpr int kCopies = 2;         // of the histogram: lanes of one bin collide less often
  static constexpr int kSlots = kBins + 1;  // the last one for what is no member

 public:
  static constexpr uint32_t kOffset = uint32_t{127 + 23} << 23;  // the bits of 2^23

  /// A weight up to 1 in units of the bins, rounded to the nearest, and kOffset more.
  static __device__ __forceinline__ uint32_t units_of(float weight) {
    constexpr float kUnitsAreOnes = 1 << 23;
    return __float_as_uint(fmaf(weight, 1 << kBinFraction, kUnitsAreOnes));
  }

  struct Shared {
    uint32_t mass[kCopies][kSlots], count[kCopies][kSlots];
  };

  /// Adds this block's members to the team's histogram.
  static __device__ void run(const Members& members, float top, Shared& shared,
                             unsigned long long* bin_mass, uint32_t* bin_count) {
    constexpr int kStep = kMostAtOnce / kSelectWarps / 128 * 128;  // members of a warp
    uint32_t* mass = shared.mass[threadIdx.x % kCopies];
    uint32_t* count = shared.count[threadIdx.x % kCopies];
#pragma unroll 1
    for (int begin = 0; __syncthreads_or(begin < members.count()); begin += kStep) {
      for (int i = threadIdx.x; i < kCopies * kSlots; i += kSelectThreads) {
        shared.mass[0][i] = shared.count[0][i] = 0;
      }
      __syncthreads();
      const int end = min(members.count(), begin + kStep);
      for_each_four(members, begin, end, [&](int, const float(&scores)[4]) {
#pragma unroll
        for (const float score : scores) {
          const float below = bins_below(top, score);
          const Bin bin(below);
          const int slot = score == -INFINITY ? kBins : bin.number;
          atomicAdd(&mass[slot], units_of(weight_in_bin(below, bin.start)));
          atomicAdd(&count[slot], 1u);
        }
      });
      __syncthreads();
      for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
        uint32_t bin_members = 0, units = 0;
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          bin_members += shared.count[copy][bin];
          units += shared.mass[copy][bin];
        }
        if (bin_members == 0) continue;
        units -= bin_members * kOffset;  // all of it modulo 2^32
        atomicAdd(&bin_mass[bin], static_cast<unsigned long long>(units));
        atomicAdd(&bin_count[bin], bin_members);
      }
    }
  }
};

}  // namespace rtpurbo::cuda
