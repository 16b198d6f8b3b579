#pragma once
// Stage 3: the bin in which mass and floor are reached. Every block of a team finds the same.

#include <climits>
#include <cub/block/block_scan.cuh>

#include "csrc/cuda/select/mass_count.cuh"
#include "csrc/cuda/select/weigh.cuh"

namespace rtpurbo::cuda {

/// Cut::bin when no member, or every member, is in.
constexpr int kNoBin = -1;
constexpr int kAllBins = kBins;

/// Above, near mass would be infinite; far keys add nothing then.
constexpr double kMostNats = 700.0;

/// A log-mass relative to the largest score.
__device__ __forceinline__ double relative_mass(float log_mass, float top) {
  return exp(fmin(static_cast<double>(log_mass) - top, kMostNats));
}

/// Which members are in: those with a larger score, and of those with this one the positions up to
/// index; or those of a bin and of all above it.
struct Cut {
  int bin;     // that holds the score, kNoBin or kAllBins
  bool whole;  // all of the bin is in, none of which is below the score
  float score;
  int32_t index;
  long long count;  // of members that are in
  double mass;      // theirs and the near keys', relative to the largest score
  double total;     // all mass
  double target;
  long long floor;
};

/// What a selection must reach.
struct Wanted {
  double share;  // of all mass
  long long floor;
  bool whole_bin = false;  // the rest of the last bin may be added

  /// Whether it is: where the bin has few members beside those above it, of about one weight.
  __device__ bool adds(int bin, long long of_bin, long long above) const {
    constexpr long long kShare = 4, kFew = 32;
    return whole_bin && bin < kBins - 1 && of_bin <= above / kShare + kFew;
  }
};

class FindBin {
 public:
  using Reached = MassCount<double>;
  using Scan = cub::BlockScan<Reached, kSelectThreads>;
  struct Shared {
    typename Scan::TempStorage scan;
    int bin;
    Cut cut;
  };

  /// The cut before its bin is refined: mass and count are of near keys and lower bins, and of this
  /// one where it is added whole. All mass is that of the bins and `outside`, which is `near` and
  /// what is left out.
  static __device__ Cut run(const Wanted& wanted, double near, double outside,
                            const unsigned long long* bin_mass, const uint32_t* bin_count,
                            Shared& shared) {
    constexpr int kOwn = kBins / kSelectThreads;
    const int first = threadIdx.x * kOwn;
    Reached own[kOwn];
    Reached sum{0.0, 0};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const double units = static_cast<double>(__ldcg(&bin_mass[first + j]));
      own[j] = {units * bin_edge(first + j) / (1 << kBinFraction), __ldcg(&bin_count[first + j])};
      sum = sum + own[j];
    }
    Reached before, all;
    Scan(shared.scan)
        .ExclusiveScan(
            sum, before, Reached{0.0, 0}, [](const Reached& a, const Reached& b) { return a + b; },
            all);
    const double total = outside + all.mass;
    const double target = wanted.share * total;
    const long long floor = min(wanted.floor, all.count);
    const bool none = near >= target && floor == 0;
    if (threadIdx.x == 0) {  // unless a bin is found
      shared.bin = kAllBins;
      shared.cut = {.bin = none ? kNoBin : kAllBins,
                    .whole = false,
                    .score = none ? INFINITY : -INFINITY,
                    .index = -1,
                    .count = none ? 0 : all.count,
                    .mass = none ? near : near + all.mass,
                    .total = total,
                    .target = target,
                    .floor = floor};
    }
    __syncthreads();
    // Neighbouring threads round the mass between them differently; the lowest bin rules.
    Reached reached{near + before.mass, before.count}, before_bin{}, of_bin{};
    int bin = kAllBins;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const Reached next = reached + own[j];
      if (!none && bin == kAllBins && own[j].count > 0 && next.reaches({target, floor})) {
        bin = first + j;
        before_bin = reached;
        of_bin = own[j];
      }
      reached = next;
    }
    if (bin != kAllBins) atomicMin(&shared.bin, bin);
    __syncthreads();
    if (bin != kAllBins && bin == shared.bin) {
      const bool whole = wanted.adds(bin, of_bin.count, before_bin.count);
      const Reached in = whole ? before_bin + of_bin : before_bin;
      shared.cut.bin = bin;
      shared.cut.whole = whole;
      shared.cut.count = in.count;
      shared.cut.mass = in.mass;
    }
    __syncthreads();
    return shared.cut;
  }
};

}  // namespace rtpurbo::cuda
