#pragma once
// A thread's two rows of a tile: their online softmax and their part of the output. In an array of
// scores or outputs element 4 j + 2 h + e is row h, column 8 j + 2 (lane % 4) + e.

#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/ptx/stmatrix.cuh"
#include "csrc/cuda/sm90/attention_parts.cuh"
#include "csrc/cuda/sm90/attention_shared.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda::sm90 {

/// Hides scores of keys that a row does not see; `m` is the position of the first row.
template <int kWidth>
__device__ __forceinline__ void mask(float (&scores)[kWidth / 2],
                                     const KeyBlock<kWidth / kBoxRows>& block, int m) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = block.first_seen(m + 8 * h);
    const uint32_t length = max(0, block.last_seen(m + 8 * h) + 1 - low);
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      const int from_low = block.begin[j / 8] + j % 8 * 8 + column - low;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (static_cast<uint32_t>(from_low + e) >= length) scores[4 * j + 2 * h + e] = -INFINITY;
      }
    }
  }
}

template <typename T, int kDim>
struct Rows {
  float out[kDim / 2];
  float maximum[2];  // the largest score when it was last looked for, to which weights are relative
  float sum[2];      // of this thread's columns only
  float decay[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& value : out) value = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  /// Turns scores into weights and finds by what the output so far decays.
  template <int kSize>
  __device__ __forceinline__ void soften(float (&scores)[kSize], float factor) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = maximum[h];
#pragma unroll
      for (int i = 2 * h; i < kSize; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = softmax_shift(top) * factor;
      decay[h] = fast_exp2(maximum[h] * factor - shift);
      maximum[h] = top;
      sum[h] *= decay[h];
#pragma unroll
      for (int i = 2 * h; i < kSize; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores[i + e] = fast_exp2(fmaf(scores[i + e], factor, -shift));
          sum[h] += scores[i + e];
        }
      }
    }
  }

  /// The same by the maximum as it is, which scores may exceed: none has to be found, and the
  /// output does not decay. Where weights are too large for that, or there is no maximum yet, no
  /// row of the warp is changed, the scores are overwritten, and the result is false.
  template <int kSize>
  __device__ __forceinline__ bool soften_as_before(float (&scores)[kSize], float factor) {
    constexpr float kMost = 16384.0f;  // of a thread's sum, so that every weight fits into fp16
    float added[2][2] = {};            // of even and odd columns: two chains of sums
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = maximum[h] * factor;
#pragma unroll
      for (int i = 2 * h; i < kSize; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores[i + e] = fast_exp2(fmaf(scores[i + e], factor, -shift));
          added[h][e] += scores[i + e];
        }
      }
    }
    const float of_block[2] = {added[0][0] + added[0][1], added[1][0] + added[1][1]};
    if (!__all_sync(~0u, of_block[0] <= kMost && of_block[1] <= kMost)) return false;
    sum[0] += of_block[0];
    sum[1] += of_block[1];
    return true;
  }

  /// Adds what was found for row h with other keys; returns by what its output decays.
  __device__ __forceinline__ float add(int h, float other, float other_sum, float factor) {
    const float top = fmaxf(maximum[h], other);
    const float shift = softmax_shift(top) * factor;
    decay[h] = fast_exp2(maximum[h] * factor - shift);
    const float share = fast_exp2(other * factor - shift);
    maximum[h] = top;
    sum[h] = sum[h] * decay[h] + other_sum * share;
    return share;
  }

  /// Once nothing is being added to the output.
  __device__ __forceinline__ void decay_out() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= decay[i / 2 % 2];
  }

  /// Ends the rows, of which `row` is the first in the tile: their log-sum-exp goes to memory, and
  /// the output is divided by the sum of its weights.
  template <bool kValues, int kKeys>
  __device__ __forceinline__ void finish(const AttentionParams& params, const Work<kKeys>& work,
                                         int row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int64_t r = work.row + row + 8 * h;
      const bool real = row + 8 * h < work.height;
      if (real && threadIdx.x % 32 % 4 == 0) {
        const float lse = maximum[h] * params.scale + fast_log2(total) * kLn2;
        if (kValues && work.part >= 0) {
          Parts<kDim>(params.parts_ptr).lse(work.part)[row + 8 * h] = lse;
        } else {
          params.lse_ptr[(work.batch * params.lse_heads + work.job.lse_head) * params.rows + r] =
              lse;
        }
      }
      if constexpr (kValues) decay[h] = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
    }
    if constexpr (kValues) decay_out();
  }

  /// Writes the output as it is to rows of kDim.
  __device__ __forceinline__ void store_part(float* part, int row, int height) const {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= height) continue;
      float* to = part + (row + 8 * h) * kDim + column;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) =
            make_float2(out[4 * j + 2 * h], out[4 * j + 2 * h + 1]);
      }
    }
  }

  /// Writes the output of a warp's 16 rows as the copy engine stores them: panels of 64 columns,
  /// kBoxBytes apart, of rows of 128 bytes with the 128-byte swizzle.
  __device__ __forceinline__ void stage_out(unsigned char* warp_rows) const {
    const int row = threadIdx.x % 16;
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows, rows below, and the same of the next columns
        const int first = 4 * (j + i / 2) + 2 * (i % 2);
        words[i] = ptx::pack_pair<T>(out[first], out[first + 1]);
      }
      const int chunk = j % 8 + threadIdx.x % 32 / 16;
      ptx::stmatrix_x4(warp_rows + j / 8 * kBoxBytes + swizzled(row, chunk), words);
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
