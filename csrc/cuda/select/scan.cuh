#pragma once
// Stage 1: the score r^-1/2 q . k of every far key, or the log-mass of every block of them; the
// largest score; and in form `full` the mass of the near keys.

#include <cfloat>

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kScanSteps = kScanKeys / kScanThreads;  // keys of a thread

__device__ __forceinline__ float load_as_float(ElementType type, const void* ptr, int64_t i) {
  switch (type) {
    case ElementType::kFloat32:
      return static_cast<const float*>(ptr)[i];
    case ElementType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(ptr)[i]);
    default:
      return to_float(static_cast<const __half*>(ptr)[i]);
  }
}

/// Of 32 consecutive keys, the one that a lane scores: even lanes the first half. Two lanes then
/// load a key's 32 bytes side by side.
__device__ __forceinline__ int key_of_lane(int lane) { return lane % 2 * 16 + lane / 2; }

/// Lane's q . k for its key among the 32 at `keys`; those outside [begin, end) are not read.
template <typename TK>
__device__ __forceinline__ float index_dot(const float* query, const TK* keys, int64_t stride,
                                           int dim, int64_t begin, int64_t end, int lane) {
  const int own = key_of_lane(lane);
  float sum = 0.0f;
  if (own < begin || own >= end) return sum;
  for (int d = 0; d < dim; ++d) sum = fmaf(query[d], to_float(keys[own * stride + d]), sum);
  return sum;
}

/// Half a key of 16 dimensions, in one load for 16-bit types.
template <typename TK>
struct alignas(16) HalfKey {
  TK values[8];

  __device__ float dot(const float (&query)[8]) const {
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) sum = fmaf(query[d], to_float(values[d]), sum);
    return sum;
  }
};

/// Both lanes of a pair hold halves of two keys; each gets the whole sum of its own key.
__device__ __forceinline__ float exchange_halves(float first, float second, int lane) {
  const bool odd = lane % 2;
  const float received = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  return (odd ? second : first) + received;
}

/// log of a sum of exponentials, kept as a shift and a sum relative to it.
struct LogSum {
  float shift = -INFINITY;
  float sum = 0.0f;

  /// A NaN or an infinite score makes the sum NaN.
  __device__ void add(float other_shift, float other_sum) {
    const float top = fmaxf(shift, other_shift);
    if (top == -INFINITY && other_sum == 0.0f) return;
    const float base = top == -INFINITY ? 0.0f : top;
    sum = sum * expf(shift - base) + other_sum * expf(other_shift - base);
    shift = top;
  }
};

/// The lanes' sums together, in lane 0.
__device__ __forceinline__ LogSum warp_log_sum(LogSum sum) {
  for (int step = 16; step > 0; step /= 2) {
    sum.add(__shfl_down_sync(0xffffffffu, sum.shift, step),
            __shfl_down_sync(0xffffffffu, sum.sum, step));
  }
  return sum;
}

/// Log-mass of the keys of 16 lanes of one parity, or with kAll of the whole warp; of two keys a
/// lane when `other` takes part (-inf otherwise).
template <bool kAll>
__device__ __forceinline__ float block_log_mass(float score, float other) {
  constexpr int kLeast = kAll ? 1 : 2;
  float top = fmaxf(score, other);
#pragma unroll
  for (int step = 16; step >= kLeast; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  }
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = expf(score - base) + expf(other - base);
#pragma unroll
  for (int step = 16; step >= kLeast; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return base + logf(sum);
}

/// What a thread saw of the members' scores.
struct ScoreStats {
  uint32_t top_key = 0;
  uint32_t poisoned = 0;
  int candidates = 0;

  __device__ void add(float score) {
    if (score == -INFINITY) return;
    ++candidates;
    if (score < INFINITY) {
      top_key = max(top_key, ordered_key(score));
    } else {
      poisoned = 1;
    }
  }
};

/// kPaired: 16 dimensions, rows of 16-byte alignment.
template <typename TK, bool kPaired>
__global__ __launch_bounds__(kScanThreads) void scan_kernel(SelectParams p, Workspace w) {
  __shared__ float query[kPaired ? 16 : kMaxIndexDim];
  __shared__ ScoreStats stats;
  __shared__ LogSum warp_near[kScanWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int dim = kPaired ? 16 : static_cast<int>(p.dim);
  const Row row = row_of(p, w.first + blockIdx.y);
  const int64_t q_offset = row.batch * p.q_index.batch_stride + row.head * p.q_index.head_stride +
                           row.row * p.q_index.row_stride;
  const float scale = rsqrtf(static_cast<float>(dim));
  for (int d = thread; d < dim; d += kScanThreads) {
    query[d] = scale * load_as_float(p.q_type, p.q_index.ptr, q_offset + d);
  }
  if (thread == 0) stats = ScoreStats();
  __syncthreads();

  const TK* keys = static_cast<const TK*>(p.k_index.ptr) + row.batch * p.k_index.batch_stride +
                   p.index_map.heads[row.head] * p.k_index.head_stride;
  const int64_t stride = p.k_index.row_stride;
  const bool wants_near = p.near_lse_ptr == nullptr;
  // Keys that are scored; the others are not read.
  const int64_t begin = wants_near ? row.start : row.far_begin;
  const int64_t end = wants_near ? row.position + 1 : row.far_end;
  const int64_t warp_first =
      static_cast<int64_t>(blockIdx.x) * kScanKeys + warp * (kScanKeys / kScanWarps);
  float value[kScanSteps];
  if constexpr (kPaired) {
    const int half = lane % 2 * 8;
    float part[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) part[d] = query[half + d];
    HalfKey<TK> loaded[kScanSteps][2];
#pragma unroll
    for (int step = 0; step < kScanSteps; ++step) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t n = warp_first + step * 32 + j * 16 + lane / 2;
        loaded[step][j] = {};
        if (n >= begin && n < end) {
          loaded[step][j] = *reinterpret_cast<const HalfKey<TK>*>(keys + n * stride + half);
        }
      }
    }
#pragma unroll
    for (int step = 0; step < kScanSteps; ++step) {
      value[step] = exchange_halves(loaded[step][0].dot(part), loaded[step][1].dot(part), lane);
    }
  } else {
    for (int step = 0; step < kScanSteps; ++step) {
      const int64_t first = warp_first + step * 32;
      value[step] =
          index_dot(query, keys + first * stride, stride, dim, begin - first, end - first, lane);
    }
  }

  const int block_size = static_cast<int>(p.block_size);
  float* scores = w.scores + blockIdx.y * w.members;
  ScoreStats own;
  LogSum near;
#pragma unroll
  for (int step = 0; step < kScanSteps; ++step) {
    const int64_t n = warp_first + step * 32 + key_of_lane(lane);
    const bool far = n >= row.far_begin && n < row.far_end;
    if (!far && n >= begin && n < end && value[step] != -INFINITY) near.add(value[step], 1.0f);
    if (!far) value[step] = -INFINITY;
  }
  const auto keep = [&](int64_t member, float score) {
    if (member < w.members) {
      scores[member] = score;
      own.add(score);
    }
  };
#pragma unroll
  for (int step = 0; step < kScanSteps; ++step) {
    const int64_t first = warp_first + step * 32;
    if (block_size == 64) {
      if (step % 2) continue;
      const float mass = block_log_mass<true>(value[step], value[step + 1]);
      if (lane == 0) keep(first / 64, mass);
    } else if (block_size == 32) {
      const float mass = block_log_mass<true>(value[step], -INFINITY);
      if (lane == 0) keep(first / 32, mass);
    } else if (block_size == 16) {
      const float mass = block_log_mass<false>(value[step], -INFINITY);
      if (lane < 2) keep(first / 16 + lane, mass);
    } else {
      keep(first + key_of_lane(lane), value[step]);
    }
  }
  own.top_key = __reduce_max_sync(0xffffffffu, own.top_key);
  own.poisoned = __reduce_or_sync(0xffffffffu, own.poisoned);
  own.candidates = __reduce_add_sync(0xffffffffu, own.candidates);
  near = warp_log_sum(near);
  if (lane == 0) {
    atomicMax(&stats.top_key, own.top_key);
    atomicOr(&stats.poisoned, own.poisoned);
    atomicAdd(&stats.candidates, own.candidates);
    warp_near[warp] = near;
  }
  __syncthreads();
  if (thread == 0) {
    Problem& problem = w.problems[blockIdx.y];
    if (stats.candidates) {
      atomicMax(&problem.top_key, stats.top_key);
      atomicOr(&problem.poisoned, stats.poisoned);
      atomicAdd(&problem.candidates, stats.candidates);
    }
    if (wants_near) {
      for (int i = 1; i < kScanWarps; ++i) warp_near[0].add(warp_near[i].shift, warp_near[i].sum);
      w.near[blockIdx.y * w.scan_chunks + blockIdx.x] =
          make_float2(warp_near[0].shift, warp_near[0].sum);
    }
  }
}

}  // namespace rtpurbo::cuda
