#pragma once
// Attention of one query to a block's selected keys: a few lanes share a key, 16 bytes each, with
// several keys on their way. Rows that are scattered need no more for the speed of memory.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/select/selector.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

/// The selected members of a block, warp by warp in the place of their scores.
class BlockList {
 public:
  static constexpr int kAtOnce = 4096;
  struct Shared {
    int32_t members[kAtOnce];
    int counts[kSelectWarps];
  };

  __device__ BlockList(const Members& members, int block_size, Shared& shared)
      : members_(members), block_size_(block_size), shared_(shared) {}

  /// Makes the lists out of the scores, and sets their bits in the mask, which is zero.
  __device__ void fill(const Selection& selection, uint64_t* selected) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    own_ = 0;
    for_each_chosen(selection, members_, members_.count(), [&](int i, uint32_t in) {
      if (!__any_sync(0xffffffffu, in)) return;
      mark_chosen(members_, i, in, block_size_, selected);
      const int4 positions = members_.four_positions(i);
      const int32_t position[4] = {positions.x, positions.y, positions.z, positions.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool chosen = in >> e & 1;
        const uint32_t lanes = __ballot_sync(0xffffffffu, chosen);
        const int place = own_ + __popc(lanes & ((1u << lane) - 1));
        if (chosen) members_.score(place) = __int_as_float(position[e]);
        own_ += __popc(lanes);
      }
    });
    if (lane == 0) shared_.counts[warp] = own_;
    __syncthreads();
    before_ = total_ = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      if (w < warp) before_ += shared_.counts[w];
      total_ += shared_.counts[w];
    }
  }

  __device__ int total() const { return total_; }

  /// Brings members [first, first + kAtOnce) of the block together, and returns how many there are.
  __device__ int gather(int first) {
    __syncthreads();
    const int begin = max(first - before_, 0);
    const int end = min(first + kAtOnce - before_, own_);
    for (int i = begin + static_cast<int>(threadIdx.x) % 32; i < end; i += 32) {
      shared_.members[before_ + i - first] = __float_as_int(members_.score(i));
    }
    __syncthreads();
    return min(total_ - first, kAtOnce);
  }

 private:
  const Members& members_;
  const int block_size_;
  Shared& shared_;
  int own_, before_, total_;
};

template <typename T, int kDim>
class ListedAttention {
  static constexpr int kLaneDims = 8;  // in 16 bytes
  static constexpr int kLanes = kDim / kLaneDims;
  static constexpr int kRows = 32 / kLanes;  // keys that a warp loads at a time
  static constexpr int kUnroll = 4;          // steps of a warp that are on their way

 public:
  struct Shared {
    float sums[kSelectWarps][kDim];
    float2 stats[kSelectWarps];
  };

  __device__ ListedAttention(const T* q, float scale) : scale_(scale * kLog2E) {
    query_ = load(q + column());
  }

  /// Adds keys j < keys, whose rows of k and v are row_of(j), or -1 for none.
  template <typename RowOf>
  __device__ void add(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int keys,
                      const RowOf& row_of) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Warps get runs that differ by one step at most.
    const int steps = (keys + kRows - 1) / kRows;
    const int begin = steps * warp / kSelectWarps, end = steps * (warp + 1) / kSelectWarps;
    float query[kLaneDims];
    unpack(query_, query);
#pragma unroll
    for (float& value : query) value *= scale_;
    Loaded next;
    // One step ahead: the first pass only loads.
#pragma unroll 1
    for (int step = begin - kUnroll; step < end; step += kUnroll) {
      const Loaded now = next;
      next = load_step(k, k_stride, v, v_stride, step + kUnroll, end, keys, row_of, lane);
      if (step < begin) continue;
      float logit[kUnroll];
      float new_top = top_;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float values[kLaneDims];
        unpack(now.k[u], values);
        float dot = 0.0f;
#pragma unroll
        for (int d = 0; d < kLaneDims; ++d) dot = fmaf(query[d], values[d], dot);
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          dot += __shfl_xor_sync(0xffffffffu, dot, distance);
        }
        logit[u] = now.in >> u & 1 ? dot : -INFINITY;
        new_top = fmaxf(new_top, logit[u]);
      }
      const float shift = softmax_shift(new_top);
      const float shrink = fast_exp2(top_ - shift);
      top_ = new_top;
      total_ *= shrink;
#pragma unroll
      for (float& value : sum_) value *= shrink;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = fast_exp2(logit[u] - shift);
        float values[kLaneDims];
        unpack(now.v[u], values);
        total_ += weight;
#pragma unroll
        for (int d = 0; d < kLaneDims; ++d) sum_[d] = fmaf(weight, values[d], sum_[d]);
      }
    }
  }

  /// Merges the block's warps; results as in Partials.
  __device__ void finish(float* sums, float2* stats, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, top_, distance);
      const float new_top = fmaxf(top_, other);
      const float shift = softmax_shift(new_top);
      const float own_share = fast_exp2(top_ - shift), other_share = fast_exp2(other - shift);
      total_ = total_ * own_share + __shfl_xor_sync(0xffffffffu, total_, distance) * other_share;
#pragma unroll
      for (float& value : sum_) {
        value = value * own_share + __shfl_xor_sync(0xffffffffu, value, distance) * other_share;
      }
      top_ = new_top;
    }
    if (lane < kLanes) {
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) shared.sums[warp][column() + d] = sum_[d];
    }
    if (lane == 0) shared.stats[warp] = make_float2(top_, total_);
    __syncthreads();
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) largest = fmaxf(largest, shared.stats[w].x);
    const float shift = softmax_shift(largest);
    float shares[kSelectWarps], all = 0.0f;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      shares[w] = fast_exp2(shared.stats[w].x - shift);
      all += shares[w] * shared.stats[w].y;
    }
    if (threadIdx.x < kDim) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kSelectWarps; ++w) {
        value = fmaf(shares[w], shared.sums[w][threadIdx.x], value);
      }
      sums[threadIdx.x] = value;
    }
    if (threadIdx.x == 0) *stats = make_float2(largest, all);
    __syncthreads();
  }

 private:
  static_assert(kDim <= kSelectThreads);

  struct Loaded {
    uint4 k[kUnroll], v[kUnroll];
    uint32_t in;  // bit u: there is such a key
  };

  template <typename RowOf>
  static __device__ Loaded load_step(const T* k, int64_t k_stride, const T* v, int64_t v_stride,
                                     int step, int end, int keys, const RowOf& row_of, int lane) {
    Loaded loaded;
    loaded.in = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      loaded.k[u] = loaded.v[u] = make_uint4(0, 0, 0, 0);
      const int j = (step + u) * kRows + lane / kLanes;
      const int64_t n = step + u < end && j < keys ? row_of(j) : -1;
      if (n < 0) continue;
      loaded.in |= 1u << u;
      loaded.k[u] = load(k + n * k_stride + column());
      loaded.v[u] = load(v + n * v_stride + column());
    }
    return loaded;
  }

  static __device__ int column() { return static_cast<int>(threadIdx.x) % kLanes * kLaneDims; }

  static __device__ uint4 load(const T* from) {
    return __ldg(reinterpret_cast<const uint4*>(from));
  }

  static __device__ void unpack(const uint4& loaded, float (&values)[kLaneDims]) {
    const T* elements = reinterpret_cast<const T*>(&loaded);
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) values[d] = to_float(elements[d]);
  }

  uint4 query_;
  const float scale_;
  float top_ = -INFINITY, total_ = 0.0f;
  float sum_[kLaneDims] = {};
};

}  // namespace rtpurbo::cuda
