#pragma once
// Stage 5: the cut inside the bin. Each block of a team finds the same by radix selection over all
// that is published.

#include "csrc/cuda/select/mass_count.cuh"
#include "csrc/cuda/select/publish.cuh"

namespace rtpurbo::cuda {

/// What is published, copied to shared memory where it fits.
class Cached {
 public:
  static constexpr int kMost = 2304;
  using Scan = cub::BlockScan<int, kSelectThreads>;
  struct Shared {
    Member members[kMost];
    int before[kSelectThreads];  // of each thread's block
    typename Scan::TempStorage scan;
  };

  __device__ Cached(const Published& published, Shared& shared) : shared_(shared) {
    int64_t count = 0;
#pragma unroll 1
    for (int first = 0; first < published.blocks(); first += kSelectThreads) {
      const int block = first + static_cast<int>(threadIdx.x);
      int before, all;
      Scan(shared_.scan)
          .ExclusiveSum(block < published.blocks() ? published.count_of(block) : 0, before, all);
      shared_.before[threadIdx.x] = before;
      __syncthreads();
      const int fitting = static_cast<int>(min(count + all, static_cast<int64_t>(kMost)) - count);
#pragma unroll 2
      for (int i = threadIdx.x; i < fitting; i += kSelectThreads) {
        int own = 0;
#pragma unroll
        for (int step = kSelectThreads / 2; step > 0; step /= 2) {
          if (shared_.before[own + step] <= i) own += step;
        }
        shared_.members[count + i] = published.load(first + own, i - shared_.before[own]);
      }
      count += all;
      __syncthreads();
    }
    count_ = count;
  }

  __device__ bool fits() const { return count_ <= kMost; }
  __device__ int64_t count() const { return count_; }

  template <typename Fn>
  __device__ void for_each(const Fn& fn) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count_; i += kSelectThreads) fn(shared_.members[i]);
  }

 private:
  int64_t count_;
  Shared& shared_;
};

/// Weights relative to the bin's edge, in units of 2^-30.
using Units = MassCount<unsigned long long>;

/// The bin that is cut: weights of its members.
struct CutBin {
  static constexpr int kUnitBits = 30;
  float top;
  int bin;

  __device__ float below(const Member& m) const { return bins_below(top, score_of(m.key)); }

  __device__ uint32_t weight(const Member& m) const {
    return static_cast<uint32_t>(weight_in_bin(below(m), static_cast<float>(bin)) *
                                 static_cast<float>(1u << kUnitBits));
  }

  __device__ double unit() const { return static_cast<double>(1ull << kUnitBits) / bin_edge(bin); }

  /// What the bin's members still have to give.
  __device__ Units wanted(const Cut& cut) const {
    const double mass = fmin(fmax(ceil((cut.target - cut.mass) * unit()), 0.0), 9.0e18);
    const long long count = max(cut.floor - cut.count, 0ll);
    // Rounding may say that nothing is wanted of a bin that was found to be needed.
    return {static_cast<unsigned long long>(mass), mass > 0.0 ? count : max(count, 1ll)};
  }

  /// Puts the last member that is in, and what it and those before it give, into the cut.
  __device__ void put(Cut& cut, const Member& last, const Units& reached) const {
    cut.score = score_of(last.key);
    cut.index = last.position;
    cut.count += reached.count;
    cut.mass += static_cast<double>(reached.mass) / unit();
  }
};

/// Masses and counts by digit, and the digit at which enough is reached.
class Digits {
 public:
  static constexpr int kBits = 9;
  static constexpr int kCount = 1 << kBits;
  using Scan = cub::BlockScan<Units, kSelectThreads>;
  struct Shared {
    uint32_t mass_low[kCount], mass_high[kCount], count[kCount];
    typename Scan::TempStorage scan;
    Units reached;
    int digit;
  };

  __device__ explicit Digits(Shared& shared) : shared_(shared) {}

  __device__ void clear() {
    __syncthreads();
    for (int d = threadIdx.x; d < kCount; d += kSelectThreads) {
      shared_.mass_low[d] = shared_.mass_high[d] = shared_.count[d] = 0;
    }
    __syncthreads();
  }

  __device__ void add(int digit, uint32_t mass) {
    // In two halves: shared memory has no 64-bit addition of its own.
    const uint32_t before = atomicAdd(&shared_.mass_low[digit], mass);
    if (before + mass < before) atomicAdd(&shared_.mass_high[digit], 1u);
    atomicAdd(&shared_.count[digit], 1u);
  }

  /// The first digit, from the largest with kDown, at which `wanted` is reached, or -1.
  template <bool kDown>
  __device__ int find(const Units& before, const Units& wanted) {
    constexpr int kOwn = kCount / kSelectThreads;
    const auto digit_at = [](int j) {
      const int place = threadIdx.x * kOwn + j;
      return kDown ? kCount - 1 - place : place;
    };
    const auto units_at = [&](int j) {
      const int digit = digit_at(j);
      return Units{
          static_cast<unsigned long long>(shared_.mass_high[digit]) << 32 | shared_.mass_low[digit],
          shared_.count[digit]};
    };
    __syncthreads();
    Units sum{0, 0};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum = sum + units_at(j);
    Units above;
    Scan(shared_.scan).ExclusiveScan(sum, above, Units{0, 0}, [](const Units& a, const Units& b) {
      return a + b;
    });
    if (threadIdx.x == 0) shared_.digit = -1;
    __syncthreads();
    Units reached = before + above;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const Units own = units_at(j);
      const Units next = reached + own;
      if (!reached.reaches(wanted) && own.count > 0 && next.reaches(wanted)) {
        shared_.digit = digit_at(j);
        shared_.reached = reached;
      }
      reached = next;
    }
    __syncthreads();
    return shared_.digit;
  }

  /// Of the digit found last: what was reached before it, and its members.
  __device__ Units reached() const { return shared_.reached; }
  __device__ int count() const { return shared_.count[shared_.digit]; }

 private:
  Shared& shared_;
};

/// The usual case: the bin's members fit shared memory, and few share a 512th of the bin.
class QuickCut {
 public:
  static constexpr int kFew = 32;
  struct Shared {
    Digits::Shared digits;
    Member few[kFew];
    int few_count;
    Member last;
    Units reached;
    bool found;
  };

  /// False, with the cut unchanged, in other cases.
  static __device__ bool run(const Cached& cached, float top, Cut& cut, Shared& shared) {
    const CutBin bin{top, cut.bin};
    const Units wanted = bin.wanted(cut);
    Digits digits(shared.digits);
    const auto part_of = [&](const Member& m) {
      const float part = (bin.below(m) - static_cast<float>(bin.bin)) * Digits::kCount;
      return static_cast<int>(fminf(part, Digits::kCount - 1.0f));
    };
    digits.clear();
    cached.for_each([&](const Member& m) { digits.add(part_of(m), bin.weight(m)); });
    const int part = digits.find<false>({0, 0}, wanted);
    if (part < 0 || digits.count() > kFew) return false;
    if (threadIdx.x == 0) {
      shared.few_count = 0;
      shared.found = false;
    }
    __syncthreads();
    cached.for_each([&](const Member& m) {
      if (part_of(m) == part) shared.few[atomicAdd(&shared.few_count, 1)] = m;
    });
    __syncthreads();
    if (threadIdx.x < 32) pick(bin, digits.reached(), wanted, shared);
    __syncthreads();
    if (shared.found) bin.put(cut, shared.last, shared.reached);
    return shared.found;
  }

 private:
  /// The member at which enough is reached; lanes hold one each.
  static __device__ void pick(const CutBin& bin, const Units& reached, const Units& wanted,
                              Shared& shared) {
    const int lane = threadIdx.x, count = shared.few_count;
    const Member own = lane < count ? shared.few[lane] : Member{0, INT32_MAX};
    const uint32_t own_weight = lane < count ? bin.weight(own) : 0;
    Units before = reached;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint32_t key = __shfl_sync(0xffffffffu, own.key, i);
      const int32_t position = __shfl_sync(0xffffffffu, own.position, i);
      const uint32_t weight = __shfl_sync(0xffffffffu, own_weight, i);
      if (key > own.key || (key == own.key && position < own.position)) {
        before = before + Units{weight, 1};
      }
    }
    const Units after = before + Units{own_weight, 1};
    if (lane < count && !before.reaches(wanted) && after.reaches(wanted)) {
      shared.last = own;
      shared.reached = after;
      shared.found = true;
    }
  }
};

/// Every case: finds the smallest set from the top by radix selection over keys; among equals the
/// lower positions, by radix selection over positions.
class AnyCut {
 public:
  struct Shared {
    Digits::Shared digits;
    uint32_t least, most;
    unsigned long long mass;
  };

  static __device__ __noinline__ Cut run(Published published, int64_t count, float top, Cut cut,
                                         Shared& shared) {
    const CutBin bin{top, cut.bin};
    const Units wanted = bin.wanted(cut);
    Digits digits(shared.digits);
    find_range(published, shared);
    const uint32_t least = shared.least;
    Units reached{0, 0};
    uint32_t found = 0;  // the digits so far of key - least
    int64_t left = count;
    for (int shift = 32 - __clz(shared.most - least); shift > 0;) {
      const int bits = min(Digits::kBits, shift);
      shift -= bits;
      digits.clear();
      published.for_each([&](const Member& m) {
        const uint32_t rest = (m.key - least) >> shift;
        if (static_cast<uint64_t>(rest) >> bits != found) return;
        digits.add(static_cast<int>(rest & ((1u << bits) - 1)), bin.weight(m));
      });
      const int digit = digits.find<true>(reached, wanted);
      if (digit < 0) {  // rounding: the whole bin is needed
        sum_masses(published, bin, shared);
        bin.put(cut, {least, INT32_MAX}, {shared.mass, count});
        return cut;
      }
      found = found << bits | static_cast<uint32_t>(digit);
      reached = digits.reached();
      left = digits.count();
    }
    const uint32_t key = least + found;
    const unsigned long long each = bin.weight({key, 0});
    long long taken = wanted.count - reached.count;
    if (wanted.mass > reached.mass) {
      const unsigned long long missing = wanted.mass - reached.mass;
      taken = max(taken, each ? static_cast<long long>((missing + each - 1) / each)
                              : static_cast<long long>(left));
    }
    taken = min(taken, static_cast<long long>(left));
    const int32_t last = taken < left ? find_position(published, key, taken, digits) : INT32_MAX;
    bin.put(cut, {key, last}, reached + Units{taken * each, taken});
    return cut;
  }

 private:
  static __device__ void find_range(const Published& published, Shared& shared) {
    if (threadIdx.x == 0) {
      shared.least = UINT32_MAX;
      shared.most = 0;
    }
    __syncthreads();
    published.for_each([&](const Member& m) {
      atomicMin(&shared.least, m.key);
      atomicMax(&shared.most, m.key);
    });
    __syncthreads();
  }

  static __device__ void sum_masses(const Published& published, const CutBin& bin, Shared& shared) {
    if (threadIdx.x == 0) shared.mass = 0;
    __syncthreads();
    published.for_each([&](const Member& m) {
      atomicAdd(&shared.mass, static_cast<unsigned long long>(bin.weight(m)));
    });
    __syncthreads();
  }

  /// Position of the n-th (from 1) of the members with this key.
  static __device__ int32_t find_position(const Published& published, uint32_t key, long long n,
                                          Digits& digits) {
    Units passed{0, 0};
    uint32_t found = 0;
    for (int shift = 31; shift > 0;) {
      const int bits = min(Digits::kBits, shift);
      shift -= bits;
      digits.clear();
      published.for_each([&](const Member& m) {
        const uint32_t rest = static_cast<uint32_t>(m.position) >> shift;
        if (m.key == key && rest >> bits == found) {
          digits.add(static_cast<int>(rest & ((1u << bits) - 1)), 0);
        }
      });
      const int digit = digits.find<false>(passed, {0, n});
      found = found << bits | static_cast<uint32_t>(digit);
      passed = digits.reached();
    }
    return static_cast<int32_t>(found);
  }
};

/// The stage as a whole, after the blocks published.
class Finish {
 public:
  struct Shared {
    Cached::Shared cached;
    union {
      QuickCut::Shared quick;
      AnyCut::Shared any;
    };
  };

  static __device__ void run(const Published& published, float top, Cut& cut, Shared& shared) {
    const Cached cached(published, shared.cached);
    if (cached.fits() && QuickCut::run(cached, top, cut, shared.quick)) return;
    __syncthreads();
    cut = AnyCut::run(published, cached.count(), top, cut, shared.any);
  }
};

/// Stages 4 and 5, where FindBin found a bin that is not added whole. `shared` has room for both.
template <typename Shared>
__device__ __forceinline__ void cut_bin(const SelectWorkspace& w, Team& team,
                                        const Members& members, float top, Cut& cut,
                                        Shared& shared) {
  if (cut.bin < 0 || cut.bin >= kBins) return;
  if (cut.whole) {
    cut.score = BinRange(top, cut.bin).low;
    return;
  }
  __syncthreads();
  Publish::run(members, top, cut.bin,
               w.cut_members + static_cast<int64_t>(blockIdx.x) * w.block_members,
               w.cut_counts + blockIdx.x, shared.publish);
  team.sync();
  const int64_t first_block = static_cast<int64_t>(team.number) * team.size;
  const Published published(w.cut_members + first_block * w.block_members,
                            w.cut_counts + first_block, w.block_members, team.size);
  Finish::run(published, top, cut, shared.finish);
}

}  // namespace rtpurbo::cuda
