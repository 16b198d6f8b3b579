#pragma once
// A warpgroup computes 64 rows of a tile. While it runs the softmax of one block, its tensor cores
// multiply the values of the block before, and the other warpgroup's turn comes.

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/ptx/ldmatrix.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/ptx/warpgroup.cuh"
#include "csrc/cuda/ptx/wgmma.cuh"
#include "csrc/cuda/sm90/attention_shared.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda::sm90 {

template <typename T, int kDim, bool kValues>
struct Consumer {
  using Memory = Shared<kDim>;
  static constexpr int kKeys = Memory::kKeys;
  static constexpr int kBoxes = kKeys / kBoxRows;
  using Place = RingPlace<Memory::kStages>;

  const AttentionParams& params;
  Memory& shared;
  const float factor;  // scale log2(e)
  const int warpgroup;
  const int lane;
  const int row;  // the first of this thread's two rows in the tile; the other is 8 below
  Place stage;

  // The warp's queries, where there are registers for them: less traffic on shared memory.
  static constexpr bool kKeepQueries = kValues && kDim <= 128;
  uint32_t kept_queries[kKeepQueries ? kDim / 16 : 1][4];
  // Element 4 j + 2 h + e belongs to row h and column 8 j + 2 (lane % 4) + e.
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 4];
  float out[kDim / 2];
  float maximum[2];
  float sum[2];  // of this thread's columns only
  float decay[2];

  /// The other warpgroup issues its products in between.
  __device__ void await_turn() { ptx::barrier_sync(1 + warpgroup, kConsumers * kWarpgroup); }
  __device__ void pass_turn() { ptx::barrier_arrive(1 + (warpgroup ^ 1), kConsumers * kWarpgroup); }

  __device__ void await_stage(const Place& place) {
    shared.stage_full[place.index].wait(place.parity);
  }
  __device__ void release_stage(const Place& place) {
    if (lane == 0) shared.stage_empty[place.index].arrive();
  }
  __device__ Place next_stage() {
    const Place place = stage;
    stage.advance();
    return place;
  }

  __device__ __forceinline__ void keep_queries(int tile) {
    const unsigned char* panels = shared.queries[tile] + warpgroup * Memory::kPanels * kBoxBytes;
    const int r = row % kConsumerRows - lane / 4 + lane % 16;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const int chunk = i % 4 * 2 + lane / 16;
      ptx::ldmatrix_x4(kept_queries[i],
                       panels + i / 4 * kBoxBytes + r * 128 + (chunk ^ r % 8) * 16);
    }
  }

  /// The first kWidth scores of each row.
  template <int kWidth>
  __device__ float (&first_scores())[kWidth / 2] {
    return reinterpret_cast<float(&)[kWidth / 2]>(scores);
  }

  /// Starts scores = Q K^T for kWidth keys from a box on.
  template <int kWidth = kKeys>
  __device__ __forceinline__ void multiply_keys(uint64_t queries, const Place& place, int box = 0) {
    const uint64_t keys = ptx::matrix_descriptor(shared.stages[place.index] + box * kBoxBytes, 0);
    ptx::pin(scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      constexpr int kSteps = kBoxColumns / 16;
      const int column = i % kSteps * 32;
      const uint64_t a = queries + ((i / kSteps * kBoxBytes + column) >> 4);
      const uint64_t b = keys + ((i / kSteps * kBoxes * kBoxBytes + column) >> 4);
      auto& to = first_scores<kWidth>();
      if constexpr (kKeepQueries) {
        if (i == 0) {
          ptx::wgmma_rows<T, kWidth, false>(to, kept_queries[i], b);
        } else {
          ptx::wgmma_rows<T, kWidth, true>(to, kept_queries[i], b);
        }
      } else {
        if (i == 0) {
          ptx::wgmma_rows<T, kWidth, false>(to, a, b);
        } else {
          ptx::wgmma_rows<T, kWidth, true>(to, a, b);
        }
      }
    }
    ptx::wgmma_commit();
  }

  /// Starts out += weights V for kWidth keys from a box on.
  template <int kWidth = kKeys>
  __device__ __forceinline__ void multiply_values(const Place& place, int box = 0) {
    const uint64_t values =
        ptx::matrix_descriptor(shared.stages[place.index] + box * kBoxBytes, kBoxes * kBoxBytes);
    ptx::pin(out);
    ptx::pin(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i) {
      ptx::wgmma_columns<T, kDim>(out, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2],
                                  weights[4 * i + 3], values + (i * 16 * 128 >> 4));
    }
    ptx::wgmma_commit();
  }

  template <int kWidth>
  __device__ __forceinline__ void mask(const KeyBlock<kWidth / kBoxRows>& block, int position) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = position + row + 8 * h;
      const int low = block.first_seen(m);
      const uint32_t length = max(0, block.last_seen(m) + 1 - low);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        const int first = block.begin[j / 8] + j % 8 * 8 + lane % 4 * 2 - low;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (static_cast<uint32_t>(first + e) >= length) scores[4 * j + 2 * h + e] = -INFINITY;
        }
      }
    }
  }

  /// Turns scores into weights, still in float, and finds by what the rows' state decays.
  template <int kWidth = kKeys>
  __device__ __forceinline__ void soften() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = maximum[h];
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        top = fmaxf(top, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = softmax_shift(top) * factor;
      decay[h] = fast_exp2(maximum[h] * factor - shift);
      maximum[h] = top;
      sum[h] *= decay[h];
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * j + 2 * h + e];
          score = fast_exp2(fmaf(score, factor, -shift));
          sum[h] += score;
        }
      }
    }
  }

  __device__ __forceinline__ void decay_out() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= decay[i / 2 % 2];
  }

  template <int kWidth = kKeys>
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      weights[i] = ptx::pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  /// Whether a value of the stage is infinite or NaN.
  __device__ __forceinline__ bool is_poisoned(const Place& place) {
    constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
    const uint4* chunks = reinterpret_cast<const uint4*>(shared.stages[place.index]);
    uint32_t top = 0;  // the largest magnitudes, which order as integers
#pragma unroll 4
    for (int i = threadIdx.x % kWarpgroup; i < Memory::kStageBytes / 16; i += kWarpgroup) {
      const uint4 chunk = chunks[i];
      top = __vimax3_u16x2(top, chunk.x & 0x7fff7fff, chunk.y & 0x7fff7fff);
      top = __vimax3_u16x2(top, chunk.z & 0x7fff7fff, chunk.w & 0x7fff7fff);
    }
    const bool found = (top & 0xffff) >= kInfinity || top >> 16 >= kInfinity;
    return ptx::barrier_or(1 + kConsumers + warpgroup, kWarpgroup, found);
  }

  /// out += weights V without the keys that a row does not see: 0 * inf would be NaN.
  template <int kWidth>
  __device__ __forceinline__ void add_seen_values(const Place& place,
                                                  const KeyBlock<kWidth / kBoxRows>& block, int box,
                                                  int position) {
    const unsigned char* values = shared.stages[place.index] + box * kBoxBytes;
#pragma unroll 1
    for (int key = 0; key < kWidth; ++key) {
      float weight[2] = {};
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {  // no run-time index into registers
        const int h = i / 2 % 2;
        if (i / 4 * 2 + i % 2 == key / 8 * 2 + key % 2) weight[h] = scores[i];
      }
      const int begin = key < kBoxRows ? block.begin[0] : block.begin[kWidth / kBoxRows - 1];
      const int n = begin + key % kBoxRows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weight[h] = __shfl_sync(~0u, weight[h], (lane & ~3) | (key % 8 / 2));
        const int m = position + row + 8 * h;
        const bool seen = n >= block.first_seen(m) && n <= block.last_seen(m);
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          const T* pair =
              reinterpret_cast<const T*>(values + i / 8 * kBoxes * kBoxBytes + key * 128 +
                                         (i % 8 ^ key % 8) * 16 + lane % 4 * 4);
          out[4 * i + 2 * h] += seen ? weight[h] * to_float(pair[0]) : 0.0f;
          out[4 * i + 2 * h + 1] += seen ? weight[h] * to_float(pair[1]) : 0.0f;
        }
      }
    }
  }

  /// A step on kWidth keys from a box on, of which some rows do not see all.
  template <int kWidth>
  __device__ __forceinline__ void masked_part(uint64_t queries,
                                              const KeyBlock<kWidth / kBoxRows>& block, int box,
                                              int position) {
    const Place keys = next_stage();
    await_stage(keys);
    await_turn();
    multiply_keys<kWidth>(queries, keys, box);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release_stage(keys);
    mask<kWidth>(block, position);
    soften<kWidth>();
    if constexpr (kValues) {
      decay_out();
      const Place values = next_stage();
      await_stage(values);
      if (is_poisoned(values)) {
        add_seen_values<kWidth>(values, block, box, position);
      } else {
        pack_weights<kWidth>();
        multiply_values<kWidth>(values, box);
        ptx::wgmma_wait<0>();
        ptx::pin(out);
      }
      __syncwarp();
      release_stage(values);
    }
  }

  /// A masked block; only one of its boxes where this warpgroup's rows see no more.
  __device__ __forceinline__ void masked_step(uint64_t queries, const KeyBlock<kBoxes>& block,
                                              int position) {
    if constexpr (kBoxes == 1) {
      masked_part<kKeys>(queries, block, 0, position);
    } else {
      const int first = position + warpgroup * kConsumerRows;
      const auto seen = [&](int box) {
        return block.begin[box] <= block.last_seen(first + kConsumerRows - 1) &&
               block.begin[box] + kBoxRows > block.first_seen(first);
      };
      const bool second = seen(1);
      if (second && seen(0)) {
        masked_part<kKeys>(queries, block, 0, position);
      } else {
        const KeyBlock<1> part{.begin = {second ? block.begin[1] : block.begin[0]},
                               .floor = block.floor,
                               .ceiling = block.ceiling,
                               .window = block.window};
        masked_part<kBoxRows>(queries, part, second, position);
      }
    }
  }

  /// `count` blocks that all rows see whole.
  __device__ __forceinline__ void full_steps(uint64_t queries, int count) {
    Place keys = next_stage();
    await_stage(keys);
    await_turn();
    multiply_keys(queries, keys);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release_stage(keys);
    soften();
    if constexpr (kValues) {
      decay_out();
      pack_weights();
    }
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      keys = next_stage();
      await_stage(keys);
      await_turn();
      multiply_keys(queries, keys);
      if constexpr (kValues) {
        const Place values = next_stage();
        await_stage(values);
        multiply_values(values);
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::pin(scores);
        release_stage(keys);
        soften();
        ptx::wgmma_wait<0>();
        ptx::pin(out);
        ptx::pin(weights);
        release_stage(values);
        decay_out();
        pack_weights();
      } else {
        pass_turn();
        ptx::wgmma_wait<0>();
        ptx::pin(scores);
        release_stage(keys);
        soften();
      }
    }
    if constexpr (kValues) {
      const Place values = next_stage();
      await_stage(values);
      multiply_values(values);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      release_stage(values);
    }
  }

  __device__ __forceinline__ void store(const Work<kKeys>& work) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int r = row + 8 * h;
      const bool real = r < work.height;
      if (real && lane % 4 == 0) {
        params.lse_ptr[(work.batch * params.lse_heads + work.job.lse_head) * params.rows +
                       work.row + r] = SoftmaxSum{maximum[h], total}.lse(params.scale);
      }
      if constexpr (kValues) {
        T* to = head_rows<T>(params.out, work.batch, work.job.head) +
                (work.row + r) * params.out.row_stride;
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int j = 0; j < kDim / 8; j += 4) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = ptx::pack_pair<T>(out[4 * (j + i) + 2 * h] * inverse,
                                         out[4 * (j + i) + 2 * h + 1] * inverse);
          }
          transpose_quad(words);
          const int column = 8 * (j + lane % 4);
          if (real && column < params.dim) {
            *reinterpret_cast<uint4*>(to + column) = {words[0], words[1], words[2], words[3]};
          }
        }
      }
    }
  }

  /// Of four lanes, lane i gets the words i of all.
  __device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = lane & step;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & step) continue;
        const uint32_t other = __shfl_xor_sync(~0u, upper ? words[i] : words[i + step], step);
        words[i] = upper ? other : words[i];
        words[i + step] = upper ? words[i + step] : other;
      }
    }
  }

  __device__ __forceinline__ void run() {
    RingPlace<Memory::kTiles> tile;
    if (warpgroup == 1) pass_turn();
    while (true) {
      shared.queries_full[tile.index].wait(tile.parity);
      const Work<kKeys>& work = shared.work[tile.index];
      if (work.height == 0) return;
#pragma unroll
      for (float& value : out) value = 0.0f;
      maximum[0] = maximum[1] = -INFINITY;
      sum[0] = sum[1] = 0.0f;
      const uint64_t queries = ptx::matrix_descriptor(
          shared.queries[tile.index] + warpgroup * Memory::kPanels * kBoxBytes, 0);
      if constexpr (kKeepQueries) keep_queries(tile.index);
      const int masked = work.blocks.masked;
      const int total = work.blocks.total;
#pragma unroll 1
      for (int i = 0; i < masked; ++i) masked_step(queries, work.blocks.at(i), work.position);
      if (masked < total) full_steps(queries, total - masked);
      store(work);
      __syncwarp();
      if (lane == 0) shared.queries_empty[tile.index].arrive();
      tile.advance();
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
