#pragma once
// Few keys that all heads of a KV head see: a warp has 16 at a time, loaded as the operands of its
// products, so that it waits for memory once. Heads are the rows of the products.

#include <cuda_runtime.h>

#include "csrc/cuda/few_keys.h"
#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

constexpr int kFewKeysOfWarp = 16;  // at a time

/// 16 bytes each kStep bytes. In assembly, and with a __syncwarp behind them: the compiler would
/// load what fits few registers, wait for it, and load more.
template <int kCount, int kStep>
__device__ __forceinline__ void load_chunks(uint4 (&chunks)[kCount], const char* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunks[i].x), "=r"(chunks[i].y), "=r"(chunks[i].z), "=r"(chunks[i].w)
                 : "l"(__cvta_generic_to_global(from + i * kStep))
                 : "memory");
  }
}

/// The lower, or the upper, halves of two registers.
__device__ __forceinline__ uint32_t paired(uint32_t first, uint32_t second, bool upper) {
  return __byte_perm(first, second, upper ? 0x7632 : 0x5410);
}

/// A set's keys and values, and those that all its heads see.
template <typename T>
class FewRows {
 public:
  __device__ FewRows(const FewKeysParams& p, const FewKeysSet& set, int64_t batch) {
    const HeadsView& k = set.from_local ? p.k_local : p.k;
    const HeadsView& v = set.from_local ? p.v_local : p.v;
    k_ = reinterpret_cast<const char*>(head_rows<const T>(k, batch, set.kv_head));
    v_ = reinterpret_cast<const char*>(head_rows<const T>(v, batch, set.kv_head));
    k_stride_ = static_cast<int>(k.row_stride * sizeof(T));
    v_stride_ = static_cast<int>(v.row_stride * sizeof(T));
    const int64_t start = p.start_ptr ? p.start_ptr[batch] : 0;
    const int hidden = static_cast<int>(min(max(start, int64_t{0}), int64_t{p.length}));
    count_ = set.from_local ? min(p.length - hidden, p.slots) : p.length - hidden;
    first_ = set.from_local ? 0 : hidden;
  }

  __device__ int count() const { return count_; }

  /// Of visible key n, or of the last one.
  __device__ const char* key(int n) const { return ptx::offset_by(k_, row(n), k_stride_); }
  __device__ const char* value(int n) const { return ptx::offset_by(v_, row(n), v_stride_); }

 private:
  __device__ int row(int n) const { return first_ + min(n, count_ - 1); }

  const char *k_, *v_;
  int k_stride_, v_stride_;  // bytes
  int first_, count_;
};

/// What a warp knows of its tiles. With g = lane / 4 and t = lane % 4 a lane holds, 16 bytes in
/// every 64, dimensions of head g and of keys g and g + 8, in the order of the products' depth;
/// and, 16 bytes in every 128, dimensions of the values 2t, 2t + 1, 2t + 8, 2t + 9, of which chunk
/// g makes column g of eight products. So it gets 16 dimensions next to each other, of head g, in
/// every 64.
template <typename T, int kDim>
class FewKeysTiles {
  static constexpr int kKeyChunks = kDim / 32, kValueChunks = kDim / 64;

 public:
  /// Of the keys from `first` on, with the query's bytes of dimension 0.
  template <bool kMore>
  __device__ void add(const FewRows<T>& rows, const char* query_row, int first, float scale) {
    uint4 query[kKeyChunks], key[2][kKeyChunks], value[4][kValueChunks];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_chunks<kKeyChunks, 64>(key[i], rows.key(first + 8 * i + g()) + t() * 16);
    }
    load_chunks<kKeyChunks, 64>(query, query_row + t() * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_chunks<kValueChunks, 128>(value[i], rows.value(first + own(i)) + g() * 16);
    }
    __syncwarp();

    float even[2][4] = {}, odd[2][4] = {};  // of every other product
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::mma_m16n8k16<T>(even[i], {query[c].x, 0, query[c].y, 0}, key[i][c].x, key[i][c].y);
        ptx::mma_m16n8k16<T>(odd[i], {query[c].z, 0, query[c].w, 0}, key[i][c].z, key[i][c].w);
      }
    }
    float weight[4], new_top = top_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = (even[i / 2][i % 2] + odd[i / 2][i % 2]) * scale;
      weight[i] = first + own(i) < rows.count() ? score : -INFINITY;
      new_top = fmaxf(new_top, weight[i]);
    }
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
    const float base = softmax_shift(new_top);
    const float shrink = kMore ? fast_exp2(top_ - base) : 0.0f;
    top_ = new_top;
    if (kMore) total_ *= shrink;
#pragma unroll
    for (float& w : weight) {
      w = fast_exp2(w - base);
      total_ += w;
    }
    const uint32_t low = ptx::pack_pair<T>(weight[0], weight[1]);
    const uint32_t high = ptx::pack_pair<T>(weight[2], weight[3]);

    // A weight of 0 does not cancel what is not finite.
    if (first + kFewKeysOfWarp > rows.count()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + own(i) < rows.count()) continue;
        for (uint4& chunk : value[i]) chunk = {};
      }
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto word = [&](int i) { return (&value[i][c].x)[j / 2]; };
        float out[4] = {};
        ptx::mma_m16n8k16<T>(out, {low, 0, high, 0}, paired(word(0), word(1), j % 2),
                             paired(word(2), word(3), j % 2));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& sum = sums_[c][i * 8 + j];
          sum = kMore ? fmaf(sum, shrink, out[i]) : out[i];
        }
      }
    }
  }

  /// [8, stride] sums and 8 statistics: the max of the scaled logits in octaves, the sum of
  /// weights.
  __device__ void write(float* sums, int stride, float2* stats) {
    total_ += __shfl_xor_sync(0xffffffffu, total_, 1);
    total_ += __shfl_xor_sync(0xffffffffu, total_, 2);
    if (t() == 0) stats[g()] = make_float2(top_, total_);
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
      float4* to = reinterpret_cast<float4*>(sums + g() * stride + c * 64 + t() * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* from = &sums_[c][4 * i];
        to[i] = make_float4(from[0], from[1], from[2], from[3]);
      }
    }
  }

 private:
  static __device__ int g() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ int t() { return static_cast<int>(threadIdx.x) % 4; }

  /// The lane's keys of a tile whose weights it has.
  static __device__ int own(int i) { return i / 2 * 8 + 2 * t() + i % 2; }

  float top_ = -INFINITY, total_ = 0.0f;  // of head g
  float sums_[kValueChunks][16] = {};
};

template <int kDim, int kWarps>
struct FewKeysShared {
  static constexpr int kHeads = FewKeysSet::kMaxHeads, kStride = kDim + 4;
  float2 stats[kWarps][kHeads];
  float sums[kWarps][kHeads][kStride];
};

/// Dimensions [d, d + kRun) of a head, of all warps.
template <typename T, int kRun, int kDim, int kWarps>
__device__ void merge_warps(const FewKeysShared<kDim, kWarps>& shared, int head, int d, T* out,
                            float* lse) {
  float top = -INFINITY, total = 0.0f, sums[kRun] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.stats[w][head].x);
  const float base = softmax_shift(top);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float2 stats = shared.stats[w][head];
    const float share = fast_exp2(stats.x - base);
    total = fmaf(share, stats.y, total);
#pragma unroll
    for (int j = 0; j < kRun; ++j) sums[j] = fmaf(share, shared.sums[w][head][d + j], sums[j]);
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  struct alignas(2 * kRun) Packed {
    uint32_t pairs[kRun / 2];
  } packed;
#pragma unroll
  for (int j = 0; j < kRun / 2; ++j) {
    packed.pairs[j] = ptx::pack_pair<T>(sums[2 * j] * scale, sums[2 * j + 1] * scale);
  }
  *reinterpret_cast<Packed*>(out + d) = packed;
  if (d == 0) *lse = lse_of_octaves(top, total);
}

/// kLoops: of more keys than its warps have at a time.
template <typename T, int kDim, int kWarps, bool kLoops>
__global__ __launch_bounds__(32 *
                             kWarps) void few_keys_kernel(const __grid_constant__ FewKeysParams p) {
  using Shared = FewKeysShared<kDim, kWarps>;
  constexpr int kThreads = 32 * kWarps;
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const FewKeysSet set = p.sets[blockIdx.x];
  const int64_t batch = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int row = min(static_cast<int>(threadIdx.x) % 32 / 4, set.heads_count - 1);
  const FewRows<T> rows(p, set, batch);
  const auto* query =
      reinterpret_cast<const char*>(head_rows<const T>(p.q, batch, set.first_head + row));
  FewKeysTiles<T, kDim> tiles;
  for (int first = warp * kFewKeysOfWarp; first < rows.count(); first += kWarps * kFewKeysOfWarp) {
    tiles.template add<kLoops>(rows, query, first, p.scale * kLog2E);
    if (!kLoops) break;
  }
  tiles.write(shared.sums[warp][0], Shared::kStride, shared.stats[warp]);
  __syncthreads();

  constexpr int kEach = Shared::kHeads * kDim / kThreads;
  constexpr int kRun = kEach < 2 ? 2 : kEach > 8 ? 8 : kEach;
  constexpr int kRuns = kDim / kRun;
  for (int i = threadIdx.x; i < set.heads_count * kRuns; i += kThreads) {
    const int own = i / kRuns, head = set.first_head + own;
    merge_warps<T, kRun>(shared, own, i % kRuns * kRun, head_rows<T>(p.out, batch, head),
                         p.lse_ptr + batch * p.heads + head);
  }
}

}  // namespace rtpurbo::cuda
