#pragma once
// Stage 5, one block a problem: the cut inside the bin, and the place of each chunk in the result.

#include <climits>

#include "csrc/cuda/select/collect.cuh"

namespace rtpurbo::cuda {

constexpr int kFinishThreads = 512;
constexpr int kDigitBits = 10;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kDigits / kFinishThreads;
constexpr int kCached = 2048;  // members of the list that shared memory holds

struct Units {
  unsigned long long mass;
  long long count;
  __device__ Units operator+(const Units& other) const {
    return {mass + other.mass, count + other.count};
  }
};

/// A member of the cut bin.
struct Member {
  uint32_t key;
  int32_t position;
};

/// Finds, by radix selection over the list of the cut bin's members, the smallest set from the top
/// that holds `target` units of mass and `floor` members; among equals the lower positions.
class CutFinder {
 public:
  using Scan = cub::BlockScan<Units, kFinishThreads>;
  struct Shared {
    unsigned long long mass[kDigits];
    uint32_t count[kDigits];
    Member cached[kCached];
    typename Scan::TempStorage scan;
    Units reached;  // before the digit found last
    int digit;
    uint32_t least, most;
  };

  __device__ CutFinder(Shared& shared, const float* scores, const int32_t* list, int count,
                       float top, int bin)
      : shared_(shared), scores_(scores), list_(list), count_(count), top_(top), bin_(bin) {
    int bits = 61;
    for (int64_t size = static_cast<int64_t>(count) + 1; size > 1; size = (size + 1) / 2) --bits;
    unit_ = static_cast<float>(1ull << min(bits, 40));
  }

  __device__ double unit() const { return unit_; }

  __device__ Member member(int64_t i) const {
    if (i < kCached) return shared_.cached[i];
    const int32_t position = list_[i];
    return {ordered_key(scores_[position]), position};
  }

  /// Sets the cut and returns the mass of the members that are in.
  __device__ unsigned long long find(unsigned long long target, long long floor, uint32_t& cut_key,
                                     int32_t& cut_index) {
    gather();
    const uint32_t least = shared_.least;
    Units reached{0, 0};
    long long equal = count_;
    uint32_t found = 0;
    const bool enough = descend<true>(
        width(shared_.most - least), target, floor,
        [&](const Member& m, uint32_t& value) {
          value = m.key - least;
          return true;
        },
        [&](const Member& m) { return weight(m.key); }, found, reached, equal);
    if (!enough) {  // rounding: the whole bin is needed
      cut_key = 0;
      cut_index = INT32_MAX;
      return reached.mass;
    }
    cut_key = least + found;
    const unsigned long long each = weight(cut_key);
    long long taken = floor - reached.count;
    if (target > reached.mass) {
      const unsigned long long missing = target - reached.mass;
      taken = max(taken, each ? static_cast<long long>((missing + each - 1) / each) : equal);
    }
    taken = min(taken, equal);
    cut_index = taken == equal ? INT32_MAX : nth_position(cut_key, taken);
    return reached.mass + taken * each;
  }

 private:
  __device__ static int width(uint32_t range) { return 32 - __clz(range); }

  __device__ unsigned long long weight(uint32_t key) const {
    return static_cast<unsigned long long>(weight_in_bin(octaves_below(top_, score_of(key)), bin_) *
                                           unit_);
  }

  /// Fills the cache, and finds the range of the keys.
  __device__ void gather() {
    if (threadIdx.x == 0) {
      shared_.least = UINT32_MAX;
      shared_.most = 0;
    }
    __syncthreads();
    uint32_t least = UINT32_MAX, most = 0;
    for (int64_t i = threadIdx.x; i < count_; i += kFinishThreads) {
      const int32_t position = list_[i];
      const uint32_t key = ordered_key(scores_[position]);
      if (i < kCached) shared_.cached[i] = {key, position};
      least = min(least, key);
      most = max(most, key);
    }
    least = __reduce_min_sync(0xffffffffu, least);
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0) {
      atomicMin(&shared_.least, least);
      atomicMax(&shared_.most, most);
    }
    __syncthreads();
  }

  /// Position of the n-th (from 1) of the members whose key is `key`.
  __device__ int32_t nth_position(uint32_t key, long long n) {
    Units reached{0, 0};
    long long equal;
    uint32_t found = 0;
    descend<false>(
        31, 0, n,
        [&](const Member& m, uint32_t& value) {
          value = static_cast<uint32_t>(m.position);
          return m.key == key;
        },
        [](const Member&) { return 0ull; }, found, reached, equal);
    return static_cast<int32_t>(found);
  }

  /// Radix selection over values of `bits` bits, from the largest when kDown: the first value at
  /// which both conditions hold, what was reached before it and how many members have it. False,
  /// with everything reached, if the conditions never hold.
  template <bool kDown, typename Value, typename Mass>
  __device__ bool descend(int bits, unsigned long long target, long long floor,
                          const Value& value_of, const Mass& mass_of, uint32_t& found,
                          Units& reached, long long& equal) {
    for (int shift = bits; shift > 0;) {
      const int digit_bits = min(kDigitBits, shift);
      shift -= digit_bits;
      const uint32_t digit_mask = (1u << digit_bits) - 1;
      __syncthreads();
      for (int d = threadIdx.x; d < kDigits; d += kFinishThreads) {
        shared_.mass[d] = 0;
        shared_.count[d] = 0;
      }
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count_; i += kFinishThreads) {
        const Member m = member(i);
        uint32_t value;
        if (!value_of(m, value)) continue;
        const uint32_t rest = value >> shift;
        if (static_cast<uint64_t>(rest) >> digit_bits != found) continue;
        if constexpr (kDown) atomicAdd(&shared_.mass[rest & digit_mask], mass_of(m));
        atomicAdd(&shared_.count[rest & digit_mask], 1u);
      }
      __syncthreads();
      if (!find_digit<kDown>(reached, target, floor)) {
        reached = shared_.reached;
        return false;
      }
      found = found << digit_bits | static_cast<uint32_t>(shared_.digit);
      reached = shared_.reached;
      equal = shared_.count[shared_.digit];
    }
    return true;
  }

  /// Sets digit and reached to the first digit at which both conditions hold; false, with reached
  /// at the end, if there is none.
  template <bool kDown>
  __device__ bool find_digit(const Units& before, unsigned long long target, long long floor) {
    Units own[kDigitsPerThread];
    Units sum{0, 0};
    const auto digit_at = [](int j) {
      const int place = threadIdx.x * kDigitsPerThread + j;
      return kDown ? kDigits - 1 - place : place;
    };
    for (int j = 0; j < kDigitsPerThread; ++j) {
      own[j] = {shared_.mass[digit_at(j)], shared_.count[digit_at(j)]};
      sum = sum + own[j];
    }
    Units above, all;
    Scan(shared_.scan)
        .ExclusiveScan(
            sum, above, Units{0, 0}, [](const Units& a, const Units& b) { return a + b; }, all);
    if (threadIdx.x == 0) {
      shared_.digit = -1;
      shared_.reached = before + all;
    }
    __syncthreads();
    Units reached = before + above;
    for (int j = 0; j < kDigitsPerThread; ++j) {
      const Units next = reached + own[j];
      const bool was = reached.mass >= target && reached.count >= floor;
      if (!was && own[j].count > 0 && next.mass >= target && next.count >= floor) {
        shared_.digit = digit_at(j);
        shared_.reached = reached;
      }
      reached = next;
    }
    __syncthreads();
    return shared_.digit >= 0;
  }

  Shared& shared_;
  const float* scores_;
  const int32_t* list_;
  const int count_;
  const float top_;
  const int bin_;
  float unit_;
};

/// The cut inside the bin, the chunks' places, count and mass.
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(SelectParams p, Workspace w) {
  __shared__ CutFinder::Shared finder_shared;
  using Scan = cub::BlockScan<int, kFinishThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  const int64_t local = blockIdx.x;
  Problem& problem = w.problems[local];
  const float* scores = w.scores + local * w.members;
  const int32_t* list = w.list + local * w.members;
  int32_t* chunk_counts = w.chunk_counts + local * w.chunks;
  const int bin = problem.cut_bin;
  double mass = problem.mass_above;
  uint32_t cut_key = 0;
  int32_t cut_index = INT32_MAX;
  if (!trivial(p, problem) && bin >= 0 && bin < kBins && p.exact) {
    const int collected = static_cast<int>(problem.collected);
    CutFinder finder(finder_shared, scores, list, collected, score_of(problem.top_key), bin);
    const double scale = finder.unit() / bin_edge(bin);
    const double wanted = ceil((problem.target - mass) * scale);
    const unsigned long long target =
        wanted <= 0.0 ? 0 : static_cast<unsigned long long>(fmin(wanted, 9.0e18));
    const unsigned long long units = finder.find(target, problem.floor_left, cut_key, cut_index);
    mass += static_cast<double>(units) / scale;
    for (int64_t i = threadIdx.x; i < collected; i += kFinishThreads) {
      const Member m = finder.member(i);
      if (m.key > cut_key || (m.key == cut_key && m.position <= cut_index)) {
        atomicAdd(&chunk_counts[m.position / kChunk], 1);
      }
    }
  } else if (!p.exact && bin >= 0 && bin < kBins) {
    mass +=
        static_cast<double>(w.bin_mass[local * kBins + bin]) * bin_edge(bin) / (1 << kBinFraction);
  }
  __threadfence();
  __syncthreads();
  int total = 0;
  for (int64_t base = 0; base < w.chunks; base += kFinishThreads) {
    const int64_t i = base + threadIdx.x;
    const int own = i < w.chunks ? __ldcg(&chunk_counts[i]) : 0;
    int before, all;
    Scan(scan_storage).ExclusiveSum(own, before, all);
    __syncthreads();
    if (i < w.chunks) chunk_counts[i] = total + before;
    total += all;
  }
  if (threadIdx.x == 0) {
    problem.cut_key = cut_key;
    problem.cut_index = cut_index;
    problem.count = total;
    const int64_t place = w.first + local;
    p.counts_ptr[place] = total <= p.capacity ? total : -1;
    float share = 1.0f;
    if (problem.poisoned) {
      share = NAN;
    } else if (!trivial(p, problem)) {
      share = static_cast<float>(fmin(1.0, mass / problem.total));
    }
    p.mass_ptr[place] = share;
  }
}

}  // namespace rtpurbo::cuda
