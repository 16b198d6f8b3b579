// Exact top-p of a row by radix selection on the order-preserving bits of the float score. Each of
// three passes histograms (mass, count) of the members that share the prefix found so far; masses
// are fixed-point integers, so their sums do not depend on the order of the atomics.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "csrc/cuda/mass_count.cuh"
#include "csrc/cuda/ordered_key.cuh"
#include "csrc/cuda/top_p.h"

namespace rtpurbo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kDigits = 2048;
constexpr int kPasses = 3;

using Fixed = unsigned long long;
using ReduceFloat = cub::BlockReduce<float, kThreads>;
using ReduceInt = cub::BlockReduce<int, kThreads>;
using ScanInt = cub::BlockScan<int, kThreads>;

using Pair = MassCount<Fixed>;
using ScanPair = cub::BlockScan<Pair, kThreads>;

/// The 32 bits of a key are found as digits of 11, 11 and 10 bits.
__device__ constexpr int digit_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }
__device__ constexpr int digit_width(int pass) { return pass == 2 ? 10 : 11; }

/// What is known of the threshold after some digits.
struct Threshold {
  uint32_t prefix;   // digits found, in place
  uint32_t mask;     // bits of them
  Fixed mass_above;  // forced members and every key above the prefix
  long long count_above;
};

template <typename T>
__global__ __launch_bounds__(kThreads) void top_p_kernel(TopPParams params, int fraction_bits) {
  __shared__ union {
    typename ReduceFloat::TempStorage reduce_float;
    typename ReduceInt::TempStorage reduce_int;
    typename ScanInt::TempStorage scan_int;
    typename ScanPair::TempStorage scan_pair;
  } temp;
  __shared__ Fixed digit_mass[kDigits];
  __shared__ int digit_count[kDigits];
  __shared__ float shared_reference;
  __shared__ int shared_candidates, shared_poisoned;
  __shared__ Threshold threshold;
  __shared__ Fixed shared_total;
  __shared__ int shared_digit;

  const int64_t row = blockIdx.x;
  const T* scores = static_cast<const T*>(params.scores_ptr) + row * params.scores_row_stride;
  int32_t* indices = params.indices_ptr + row * params.n;
  const int64_t n = params.n;
  const int thread = threadIdx.x;
  const float forced_lse = params.forced_lse_ptr ? params.forced_lse_ptr[row] : -INFINITY;

  float top = forced_lse;
  int candidates = 0;
  int poisoned = !(forced_lse < INFINITY);
  for (int64_t i = thread; i < n; i += kThreads) {
    const float score = static_cast<float>(scores[i]);
    poisoned |= !(score < INFINITY);
    candidates += score != -INFINITY;
    top = fmaxf(top, score);
  }
  top = ReduceFloat(temp.reduce_float).Reduce(top, [](float a, float b) { return fmaxf(a, b); });
  __syncthreads();
  candidates = ReduceInt(temp.reduce_int).Sum(candidates);
  __syncthreads();
  poisoned = ReduceInt(temp.reduce_int).Sum(poisoned);
  if (thread == 0) {
    shared_reference = top;
    shared_candidates = candidates;
    shared_poisoned = poisoned;
  }
  __syncthreads();
  const float reference = shared_reference;
  const bool everything = shared_poisoned || params.p >= 1.0;
  const bool nothing = !everything && reference == -INFINITY;
  const double unit = static_cast<double>(1ull << fraction_bits);
  const auto weight = [&](float score) {
    return static_cast<Fixed>(exp(static_cast<double>(score) - reference) * unit + 0.5);
  };

  uint32_t cut_key = 0;      // keys above it are in
  long long ties_taken = 0;  // members equal to it that are in, by ascending position
  if (!everything && !nothing) {
    const long long floor_count = params.min_members < shared_candidates
                                      ? params.min_members
                                      : static_cast<long long>(shared_candidates);
    if (thread == 0) threshold = {0, 0, forced_lse == -INFINITY ? 0 : weight(forced_lse), 0};
    Fixed target = 0;
    bool enough = false;
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int d = thread; d < kDigits; d += kThreads) {
        digit_mass[d] = 0;
        digit_count[d] = 0;
      }
      if (thread == 0) shared_digit = -1;
      __syncthreads();
      const Threshold before = threshold;
      const uint32_t digit_mask = (1u << digit_width(pass)) - 1;
      for (int64_t i = thread; i < n; i += kThreads) {
        const float score = static_cast<float>(scores[i]);
        const uint32_t key = ordered_key(score);
        if (score == -INFINITY || (key & before.mask) != before.prefix) continue;
        const uint32_t digit = (key >> digit_shift(pass)) & digit_mask;
        atomicAdd(&digit_mass[digit], weight(score));
        atomicAdd(&digit_count[digit], 1);
      }
      __syncthreads();
      // Thread t owns the digits [top - 4t - 3, top - 4t], so an inclusive scan runs from the top.
      constexpr int kPerThread = kDigits / kThreads;
      Pair own[kPerThread];
      Pair sum{0, 0};
      for (int j = 0; j < kPerThread; ++j) {
        const int d = kDigits - 1 - (thread * kPerThread + j);
        own[j] = {digit_mass[d], digit_count[d]};
        sum = sum + own[j];
      }
      Pair above, all;
      ScanPair(temp.scan_pair)
          .ExclusiveScan(
              sum, above, Pair{0, 0}, [](const Pair& a, const Pair& b) { return a + b; }, all);
      if (pass == 0) {
        if (thread == 0) shared_total = before.mass_above + all.mass;
        __syncthreads();
        const double wanted = ceil(params.p * static_cast<double>(shared_total));
        target =
            wanted < static_cast<double>(shared_total) ? static_cast<Fixed>(wanted) : shared_total;
        enough = before.mass_above >= target && floor_count == 0;
        if (enough) break;
      }
      // The first digit from the top at which both conditions hold.
      Pair reached{before.mass_above + above.mass, before.count_above + above.count};
      for (int j = 0; j < kPerThread; ++j) {
        const bool was = reached.mass >= target && reached.count >= floor_count;
        const Pair next = reached + own[j];
        if (!was && own[j].count > 0 && next.mass >= target && next.count >= floor_count) {
          const uint32_t digit = kDigits - 1 - (thread * kPerThread + j);
          threshold = {before.prefix | (digit << digit_shift(pass)),
                       before.mask | (digit_mask << digit_shift(pass)), reached.mass,
                       reached.count};
          shared_digit = digit;
        }
        reached = next;
      }
      __syncthreads();
    }
    __syncthreads();
    if (enough) {
      cut_key = 0xffffffffu;
    } else {
      cut_key = threshold.prefix;
      const int digit = shared_digit;
      const long long equal = digit_count[digit];
      const Fixed each = digit_mass[digit] / static_cast<Fixed>(equal);
      long long need = floor_count - threshold.count_above;
      if (target > threshold.mass_above) {
        const Fixed missing = target - threshold.mass_above;
        const long long by_mass =
            each == 0 ? equal : static_cast<long long>((missing + each - 1) / each);
        need = need > by_mass ? need : by_mass;
      }
      ties_taken = need < equal ? need : equal;
    }
  }

  // Emit in ascending order: a block-wide prefix sum per chunk keeps positions and tie ranks.
  long long written = 0, ties_seen = 0;
  if (!nothing) {
    for (int64_t base = 0; base < n; base += kThreads) {
      const int64_t i = base + thread;
      const float score = i < n ? static_cast<float>(scores[i]) : -INFINITY;
      const bool candidate = i < n && score != -INFINITY;
      const uint32_t key = ordered_key(score);
      int is_tie = candidate && !everything && key == cut_key;
      int tie_rank, chunk_ties;
      ScanInt(temp.scan_int).ExclusiveSum(is_tie, tie_rank, chunk_ties);
      __syncthreads();
      const bool in = candidate && (everything || key > cut_key ||
                                    (is_tie && ties_seen + tie_rank < ties_taken));
      int slot, chunk_in;
      ScanInt(temp.scan_int).ExclusiveSum(static_cast<int>(in), slot, chunk_in);
      __syncthreads();
      if (in) indices[written + slot] = static_cast<int32_t>(i);
      written += chunk_in;
      ties_seen += chunk_ties;
    }
  }
  for (int64_t i = written + thread; i < n; i += kThreads) indices[i] = -1;
  if (thread == 0) {
    params.counts_ptr[row] = static_cast<int32_t>(written);
    float mass = 1.0f;
    if (shared_poisoned) {
      mass = NAN;
    } else if (!everything && !nothing) {
      Fixed in = threshold.mass_above;
      if (ties_taken > 0) in += ties_taken * (digit_mass[shared_digit] / digit_count[shared_digit]);
      mass = static_cast<float>(static_cast<double>(in) / static_cast<double>(shared_total));
    }
    params.mass_ptr[row] = mass;
  }
}

template <typename T>
cudaError_t launch(const TopPParams& params, int fraction_bits, cudaStream_t stream) {
  constexpr int64_t kMaxGrid = INT32_MAX;
  for (int64_t first = 0; first < params.rows; first += kMaxGrid) {
    TopPParams part = params;
    part.rows = params.rows - first < kMaxGrid ? params.rows - first : kMaxGrid;
    part.scores_ptr = static_cast<const T*>(params.scores_ptr) + first * params.scores_row_stride;
    part.forced_lse_ptr = params.forced_lse_ptr ? params.forced_lse_ptr + first : nullptr;
    part.indices_ptr += first * params.n;
    part.counts_ptr += first;
    part.mass_ptr += first;
    top_p_kernel<T><<<static_cast<unsigned>(part.rows), kThreads, 0, stream>>>(part, fraction_bits);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_top_p(const TopPParams& params, cudaStream_t stream) {
  // Weights are at most 1, so n + 1 of them sum to less than 2^62.
  int fraction_bits = 61;
  for (int64_t size = params.n + 1; size > 1; size = (size + 1) / 2) --fraction_bits;
  if (fraction_bits > 48) fraction_bits = 48;
  switch (params.scores_type) {
    case ElementType::kFloat32:
      return launch<float>(params, fraction_bits, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(params, fraction_bits, stream);
    case ElementType::kFloat16:
      return launch<__half>(params, fraction_bits, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace rtpurbo::cuda
