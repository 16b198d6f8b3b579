#pragma once
// Stage 3: how many members of each chunk are in for certain, and which ones the cut bin holds; the
// last block of a problem finds the cut inside that bin and the place of each chunk in the result.

#include <climits>
#include <cub/block/block_reduce.cuh>

#include "csrc/cuda/select/histogram.cuh"

namespace rtpurbo::cuda {

constexpr int kCollectThreads = 512;
constexpr int kDigits = 2048;
constexpr int kDigitsPerThread = kDigits / kCollectThreads;

/// The 32 bits of an ordered key as digits of 11, 11 and 10 bits.
__device__ constexpr int digit_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }
__device__ constexpr int digit_width(int pass) { return pass == 2 ? 10 : 11; }

struct Units {
  unsigned long long mass;
  long long count;
  __device__ Units operator+(const Units& other) const {
    return {mass + other.mass, count + other.count};
  }
};

/// Finds, by radix selection over the list of the cut bin's members, the smallest set from the top
/// that holds `target` units of mass and `floor` members; among equals the lower positions.
class CutFinder {
 public:
  using Scan = cub::BlockScan<Units, kCollectThreads>;
  struct Shared {
    unsigned long long mass[kDigits];
    uint32_t count[kDigits];
    typename Scan::TempStorage scan;
    Units reached;  // above the prefix found so far
    int digit;
  };

  __device__ CutFinder(Shared& shared, const float* scores, const int32_t* list, int count,
                       float top, int bin)
      : shared_(shared), scores_(scores), list_(list), count_(count), top_(top), bin_(bin) {
    int bits = 61;
    for (int64_t size = static_cast<int64_t>(count) + 1; size > 1; size = (size + 1) / 2) --bits;
    unit_ = static_cast<float>(1ull << min(bits, 40));
  }

  __device__ double unit() const { return unit_; }

  __device__ unsigned long long weight(float score) const {
    return static_cast<unsigned long long>(weight_in_bin(octaves_below(top_, score), bin_) * unit_);
  }

  /// Sets the cut and returns the mass of the members that are in.
  __device__ unsigned long long find(unsigned long long target, long long floor, uint32_t& cut_key,
                                     int32_t& cut_index) {
    uint32_t prefix = 0, mask = 0;
    Units reached{0, 0};
    for (int pass = 0; pass < 3; ++pass) {
      const uint32_t digits = (1u << digit_width(pass)) - 1;
      fill([&](float score, int32_t, auto add) {
        const uint32_t key = ordered_key(score);
        if ((key & mask) == prefix) add((key >> digit_shift(pass)) & digits, weight(score));
      });
      if (!descend<true>(reached, target, floor)) {  // rounding: the whole bin is needed
        cut_key = 0;
        cut_index = INT32_MAX;
        return shared_.reached.mass;
      }
      prefix |= static_cast<uint32_t>(shared_.digit) << digit_shift(pass);
      mask |= digits << digit_shift(pass);
      reached = shared_.reached;
    }
    const long long equal = shared_.count[shared_.digit];
    const unsigned long long each = shared_.mass[shared_.digit] / equal;
    long long taken = floor - reached.count;
    if (target > reached.mass) {
      const unsigned long long missing = target - reached.mass;
      taken = max(taken, each ? static_cast<long long>((missing + each - 1) / each) : equal);
    }
    taken = min(taken, equal);
    cut_key = prefix;
    cut_index = taken == equal ? INT32_MAX : nth_position(prefix, taken);
    return reached.mass + taken * each;
  }

 private:
  /// Position of the n-th (from 1) of the members whose key is `key`.
  __device__ int32_t nth_position(uint32_t key, long long n) {
    uint32_t prefix = 0, mask = 0;
    Units reached{0, 0};
    for (int pass = 0; pass < 3; ++pass) {
      const uint32_t digits = (1u << digit_width(pass)) - 1;
      fill([&](float score, int32_t position, auto add) {
        const uint32_t place = static_cast<uint32_t>(position);
        if (ordered_key(score) == key && (place & mask) == prefix) {
          add((place >> digit_shift(pass)) & digits, 0ull);
        }
      });
      descend<false>(reached, 0, n);
      prefix |= static_cast<uint32_t>(shared_.digit) << digit_shift(pass);
      mask |= digits << digit_shift(pass);
      reached = shared_.reached;
    }
    return static_cast<int32_t>(prefix);
  }

  template <typename Visit>
  __device__ void fill(const Visit& visit) {
    __syncthreads();
    for (int d = threadIdx.x; d < kDigits; d += kCollectThreads) {
      shared_.mass[d] = 0;
      shared_.count[d] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count_; i += kCollectThreads) {
      const int32_t position = __ldcg(&list_[i]);
      visit(scores_[position], position, [&](uint32_t digit, unsigned long long mass) {
        atomicAdd(&shared_.mass[digit], mass);
        atomicAdd(&shared_.count[digit], 1u);
      });
    }
    __syncthreads();
  }

  /// Sets digit and reached to the first digit, from the largest when kDown, at which both
  /// conditions hold; false, with reached at the end, if there is none.
  template <bool kDown>
  __device__ bool descend(const Units& before, unsigned long long target, long long floor) {
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
__device__ inline void finish(const SelectParams& p, const Workspace& w, Problem& problem) {
  __shared__ CutFinder::Shared finder_shared;
  using Scan = cub::BlockScan<int, kCollectThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  const int64_t local = blockIdx.y;
  const float* scores = w.scores + local * w.members;
  const int32_t* list = w.list + local * w.members;
  int32_t* chunk_counts = w.chunk_counts + local * w.chunks;
  const int bin = problem.cut_bin;
  double mass = problem.mass_above;
  uint32_t cut_key = 0;
  int32_t cut_index = INT32_MAX;
  if (!trivial(p, problem) && bin >= 0 && bin < kBins && p.exact) {
    const int collected = static_cast<int>(__ldcg(&problem.collected));
    CutFinder finder(finder_shared, scores, list, collected, score_of(problem.top_key), bin);
    const double scale = finder.unit() / bin_edge(bin);
    const double wanted = ceil((problem.target - mass) * scale);
    const unsigned long long target =
        wanted <= 0.0 ? 0 : static_cast<unsigned long long>(fmin(wanted, 9.0e18));
    const unsigned long long units = finder.find(target, problem.floor_left, cut_key, cut_index);
    mass += static_cast<double>(units) / scale;
    for (int i = threadIdx.x; i < collected; i += kCollectThreads) {
      const int32_t position = __ldcg(&list[i]);
      const uint32_t key = ordered_key(scores[position]);
      if (key > cut_key || (key == cut_key && position <= cut_index)) {
        atomicAdd(&chunk_counts[position / kChunk], 1);
      }
    }
  } else if (!p.exact && bin >= 0 && bin < kBins) {
    mass += static_cast<double>(__ldcg(&w.bin_mass[local * kBins + bin])) * bin_edge(bin) /
            (1 << kBinFraction);
  }
  __threadfence();
  __syncthreads();
  int total = 0;
  for (int64_t base = 0; base < w.chunks; base += kCollectThreads) {
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

__global__ __launch_bounds__(kCollectThreads) void collect_kernel(SelectParams p, Workspace w) {
  __shared__ int sure;
  Problem& problem = w.problems[blockIdx.y];
  const bool everything = problem.poisoned || p.p >= 1.0;
  const int cut_bin = problem.cut_bin;
  const float top = score_of(problem.top_key);
  const float* scores = w.scores + blockIdx.y * w.members;
  if (threadIdx.x == 0) sure = 0;
  __syncthreads();
  int own = 0;
#pragma unroll
  for (int step = 0; step < kChunk / kCollectThreads; ++step) {
    const int64_t i =
        static_cast<int64_t>(blockIdx.x) * kChunk + step * kCollectThreads + threadIdx.x;
    const float score = i < w.members ? scores[i] : -INFINITY;
    if (score == -INFINITY) continue;
    if (everything) {
      ++own;
      continue;
    }
    const int bin = bin_of(octaves_below(top, score));
    if (bin < cut_bin || (bin == cut_bin && !p.exact)) {
      ++own;
    } else if (bin == cut_bin) {
      w.list[blockIdx.y * w.members + atomicAdd(&problem.collected, 1u)] = static_cast<int32_t>(i);
    }
  }
  own = __reduce_add_sync(0xffffffffu, own);
  if (threadIdx.x % 32 == 0) atomicAdd(&sure, own);
  __syncthreads();
  if (threadIdx.x == 0) w.chunk_counts[blockIdx.y * w.chunks + blockIdx.x] = sure;
  if (last_block(&problem.collect_ticket, gridDim.x)) finish(p, w, problem);
}

}  // namespace rtpurbo::cuda
