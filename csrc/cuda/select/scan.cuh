#pragma once
// Stage 1: the score r^-1/2 q . k of every far key, or the log-mass of every block of them; the
// largest score; and in form `full` the mass of the near keys.

#include <cfloat>

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kScanSteps = kChunk / kScanThreads;  // keys of a thread

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

/// q . k for one key; kDim > 0 fixes the index dim and loads 16 bytes at a time.
template <typename TK, int kDim>
__device__ __forceinline__ float index_dot(const float* query, const TK* key, int dim) {
  float sum = 0.0f;
  if constexpr (kDim > 0) {
    constexpr int kPerLoad = 16 / sizeof(TK);
#pragma unroll
    for (int d = 0; d < kDim; d += kPerLoad) {
      const uint4 raw = *reinterpret_cast<const uint4*>(key + d);
      const TK* part = reinterpret_cast<const TK*>(&raw);
#pragma unroll
      for (int j = 0; j < kPerLoad; ++j) sum = fmaf(query[d + j], to_float(part[j]), sum);
    }
  } else {
    for (int d = 0; d < dim; ++d) sum = fmaf(query[d], to_float(key[d]), sum);
  }
  return sum;
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

template <int kWidth>
__device__ __forceinline__ float segment_max(float value) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

template <int kWidth>
__device__ __forceinline__ float segment_sum(float value) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

/// Log-mass of kWidth lanes' scores, of two a lane when `other` takes part (-inf otherwise).
template <int kWidth>
__device__ __forceinline__ float segment_log_mass(float score, float other) {
  const float top = segment_max<kWidth>(fmaxf(score, other));
  const float base = top == -INFINITY ? 0.0f : top;
  return base + logf(segment_sum<kWidth>(expf(score - base) + expf(other - base)));
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

template <typename TK, int kDim>
__global__ __launch_bounds__(kScanThreads) void scan_kernel(SelectParams p, Workspace w) {
  __shared__ float query[kDim > 0 ? kDim : kMaxIndexDim];
  __shared__ ScoreStats stats;
  __shared__ LogSum warp_near[kScanWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int dim = kDim > 0 ? kDim : static_cast<int>(p.dim);
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
  const bool wants_near = p.near_lse_ptr == nullptr;
  const int64_t warp_first =
      static_cast<int64_t>(blockIdx.x) * kChunk + warp * (kChunk / kScanWarps);
  const int block_size = static_cast<int>(p.block_size);
  float* scores = w.scores + blockIdx.y * w.members;
  float score[kScanSteps];
  ScoreStats own;
  LogSum near;
#pragma unroll
  for (int step = 0; step < kScanSteps; ++step) {
    const int64_t n = warp_first + step * 32 + lane;
    const bool far = n >= row.far_begin && n < row.far_end;
    const bool close = wants_near && n >= row.start && n <= row.position && !far;
    const float value =
        far || close ? index_dot<TK, kDim>(query, keys + n * p.k_index.row_stride, dim) : -INFINITY;
    score[step] = far ? value : -INFINITY;
    if (close && value != -INFINITY) near.add(value, 1.0f);
  }
#pragma unroll
  for (int step = 0; step < kScanSteps; ++step) {
    const int64_t n = warp_first + step * 32 + lane;
    if (block_size == 64) {
      if (step % 2) continue;
      const float mass = segment_log_mass<32>(score[step], score[step + 1]);
      if (lane == 0 && n / 64 < w.members) {
        scores[n / 64] = mass;
        own.add(mass);
      }
    } else if (block_size == 32) {
      const float mass = segment_log_mass<32>(score[step], -INFINITY);
      if (lane == 0 && n / 32 < w.members) {
        scores[n / 32] = mass;
        own.add(mass);
      }
    } else if (block_size == 16) {
      const float mass = segment_log_mass<16>(score[step], -INFINITY);
      if (lane % 16 == 0 && n / 16 < w.members) {
        scores[n / 16] = mass;
        own.add(mass);
      }
    } else if (n < w.members) {
      scores[n] = score[step];
      own.add(score[step]);
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
