#pragma once
// Attention of one query to a block's selected keys: a few lanes share a key, 16 bytes each, with
// several keys on their way. Rows that are scattered need no more for the speed of memory; more on
// their way would keep the code that uses them waiting, which comes from memory, too.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/evict_first.cuh"
#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/select/selector.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

/// The selected members of a block, warp by warp in the place of their scores.
class BlockList {
 public:
  static constexpr int kAtOnce = 2048;
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
  static constexpr int kSteps = 3;     // of a warp that are on their way
  static constexpr int kLaneDims = 8;  // in 16 bytes
  static constexpr int kLanes = kDim / kLaneDims;
  static constexpr int kRows = 32 / kLanes;  // keys of a step

  /// What a warp's lanes copied for a step, each for itself.
  struct Arrivals {
    uint4 k[32], v[32];
  };

 public:
  struct Shared {
    union {
      Arrivals arrivals[kSteps];
      float sum[kDim];
    } of_warp[kSelectWarps];
    float2 stats[kSelectWarps];
  };

  __device__ ListedAttention(const T* q, float scale, Shared& shared)
      : shared_(shared), scale_(scale * kLog2E) {
    query_ = *reinterpret_cast<const uint4*>(q + column());
  }

  /// Adds keys j < keys, whose rows of k and v are row_of(j), or -1 for none.
  template <typename RowOf>
  __device__ void add(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int keys,
                      const RowOf& row_of) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Warps get runs that differ by one step at most.
    const int steps = (keys + kRows - 1) / kRows;
    const int begin = steps * warp / kSelectWarps, end = steps * (warp + 1) / kSelectWarps;
    Arrivals* arrivals = shared_.of_warp[warp].arrivals;
    const T *own_k_rows = k + column(), *own_v_rows = v + column();
    const int k_bytes = static_cast<int>(k_stride * sizeof(T));
    const int v_bytes = static_cast<int>(v_stride * sizeof(T));
    const uint64_t policy = ptx::evict_first();
    uint32_t seen = 0;  // bit i: the lane's key of arrivals[i] is one
    const auto fetch = [&](int step, int place) {
      if (step < end) {
        const int j = step * kRows + lane / kLanes;
        const int n = j < keys ? row_of(j) : -1, row = max(n, 0);
        ptx::cp_async_16(&arrivals[place].k[lane], ptx::offset_by(own_k_rows, row, k_bytes), n >= 0,
                         policy);
        ptx::cp_async_16(&arrivals[place].v[lane], ptx::offset_by(own_v_rows, row, v_bytes), n >= 0,
                         policy);
        seen = (seen & ~(1u << place)) | static_cast<uint32_t>(n >= 0) << place;
      }
      ptx::cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) fetch(begin + i, i);
    float query[kLaneDims];
    unpack(query_, query);
#pragma unroll
    for (float& value : query) value *= scale_;
    int place = 0;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      ptx::cp_async_wait<kSteps - 1>();
      const uint4 own_k = arrivals[place].k[lane], own_v = arrivals[place].v[lane];
      float values[kLaneDims];
      unpack(own_k, values);
      float logit = 0.0f;
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) logit = fmaf(query[d], values[d], logit);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        logit += __shfl_xor_sync(0xffffffffu, logit, distance);
      }
      if (!(seen >> place & 1)) logit = -INFINITY;
      const float new_top = fmaxf(top_, logit);
      const float shift = softmax_shift(new_top);
      const float shrink = fast_exp2(top_ - shift), weight = fast_exp2(logit - shift);
      top_ = new_top;
      total_ = fmaf(total_, shrink, weight);
      unpack(own_v, values);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) sum_[d] = fmaf(weight, values[d], sum_[d] * shrink);
      fetch(step + kSteps, place);
      place = place + 1 == kSteps ? 0 : place + 1;
    }
    ptx::cp_async_wait<0>();
    __syncwarp();  // their place is used anew
  }

  /// Merges the block's warps; results as in Partials.
  __device__ void finish(float* sums, float2* stats) {
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
      for (int d = 0; d < kLaneDims; ++d) shared_.of_warp[warp].sum[column() + d] = sum_[d];
    }
    if (lane == 0) shared_.stats[warp] = make_float2(top_, total_);
    __syncthreads();
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) largest = fmaxf(largest, shared_.stats[w].x);
    const float shift = softmax_shift(largest);
    float shares[kSelectWarps], all = 0.0f;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      shares[w] = fast_exp2(shared_.stats[w].x - shift);
      all += shares[w] * shared_.stats[w].y;
    }
    if (threadIdx.x < kDim) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kSelectWarps; ++w) {
        value = fmaf(shares[w], shared_.of_warp[w].sum[threadIdx.x], value);
      }
      sums[threadIdx.x] = value;
    }
    if (threadIdx.x == 0) *stats = make_float2(largest, all);
    __syncthreads();
  }

 private:
  static_assert(kDim <= kSelectThreads);

  static __device__ int column() { return static_cast<int>(threadIdx.x) % kLanes * kLaneDims; }

  static __device__ void unpack(const uint4& loaded, float (&values)[kLaneDims]) {
    const T* elements = reinterpret_cast<const T*>(&loaded);
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) values[d] = to_float(elements[d]);
  }

  Shared& shared_;
  uint4 query_;
  const float scale_;
  float top_ = -INFINITY, total_ = 0.0f;
  float sum_[kLaneDims] = {};
};

}  // namespace rtpurbo::cuda
