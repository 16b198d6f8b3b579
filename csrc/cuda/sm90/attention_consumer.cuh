#pragma once
// A warpgroup computes 64 rows of each tile. While it runs the softmax of one block, the tensor
// cores multiply the values of the block before and then serve the other warpgroup.

#include "csrc/cuda/sm90/attention_poison.cuh"
#include "csrc/cuda/sm90/attention_products.cuh"
#include "csrc/cuda/sm90/attention_rows.cuh"

namespace rtpurbo::cuda::sm90 {

template <typename T, int kDim, bool kValues>
struct Consumer {
  using Memory = Shared<kDim>;
  using Place = RingPlace<Memory::kStages>;
  static constexpr int kKeys = Memory::kKeys;
  static constexpr int kBoxes = kKeys / kBoxRows;
  static constexpr int kPanelBytes = kBoxes * kBoxBytes;

  const AttentionParams& params;
  Memory& shared;
  const float factor;  // scale log2(e)
  const int warpgroup;
  const int row;  // the first of the thread's two rows in the tile; the other is 8 below
  Place stage;

  // At 256 they do not fit into registers; without values ptxas serialises such products (C7511).
  Queries<kDim, kValues && kDim <= 128> queries;
  float scores[kKeys / 2];
  uint32_t weights[kKeys / kStep][4];
  Rows<T, kDim> rows;

  /// Without values the two take turns in starting their products. With values the tensor cores are
  /// busier, by 2 to 3 %, where they come as they are ready; only the compiler keeps them in order.
  __device__ void await_turn() const {
    if constexpr (kValues) {
      asm volatile("" ::: "memory");
    } else {
      ptx::NamedBarrier{1 + warpgroup, kConsumers * kWarpgroup}.sync();
    }
  }
  __device__ void pass_turn() const {
    if constexpr (kValues) {
      asm volatile("" ::: "memory");
    } else {
      ptx::NamedBarrier{1 + (warpgroup ^ 1), kConsumers * kWarpgroup}.arrive();
    }
  }

  __device__ Place await_stage() {
    const Place place = stage;
    shared.stage_full[place.index].wait(place.parity);
    stage.advance();
    return place;
  }
  __device__ void release(const Place& place) {
    if (threadIdx.x % 32 == 0) shared.stage_empty[place.index].arrive();
  }

  /// The first kWidth scores of each row.
  template <int kWidth>
  __device__ float (&first_scores())[kWidth / 2] {
    return reinterpret_cast<float(&)[kWidth / 2]>(scores);
  }

  template <int kWidth>
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      weights[i / 4][i % 4] = ptx::pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  /// scores = Q K^T for kWidth keys from a box of the next stage on.
  template <int kWidth>
  __device__ __forceinline__ void find_scores(int box) {
    const Place keys = await_stage();
    await_turn();
    multiply_keys<T, kWidth>(first_scores<kWidth>(), queries,
                             shared.stages[keys.index] + box * kBoxBytes, kPanelBytes);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release(keys);
  }

  /// A step on kWidth keys from a box on, of which some rows do not see all.
  template <int kWidth>
  __device__ __forceinline__ void masked_part(const KeyBlock<kWidth / kBoxRows>& block, int box,
                                              int position) {
    find_scores<kWidth>(box);
    mask<kWidth>(first_scores<kWidth>(), block, position + row);
    rows.soften(first_scores<kWidth>(), factor);
    if constexpr (kValues) {
      rows.decay_out();
      const Place values = await_stage();
      const auto& bytes = shared.stages[values.index];
      const ptx::NamedBarrier barrier{1 + kConsumers + warpgroup, kWarpgroup};
      if (is_poisoned<T>(bytes, barrier)) {
        add_seen_values<T, kWidth, kDim>(rows.out, first_scores<kWidth>(), bytes + box * kBoxBytes,
                                         kPanelBytes, block, position + row);
      } else {
        pack_weights<kWidth>();
        multiply_values<T, kWidth, kDim>(rows.out, weights, bytes + box * kBoxBytes, kPanelBytes);
        ptx::wgmma_wait<0>();
        ptx::pin(rows.out);
      }
      __syncwarp();
      release(values);
    }
  }

  /// A masked block; of its two boxes only one where this warpgroup's rows see no more.
  __device__ __forceinline__ void masked_step(const KeyBlock<kBoxes>& block, int position) {
    if constexpr (kBoxes == 1) {
      masked_part<kKeys>(block, 0, position);
    } else {
      const int first = position + warpgroup * kConsumerRows;
      const auto seen = [&](int begin) {
        return begin <= block.last_seen(first + kConsumerRows - 1) &&
               begin + kBoxRows > block.first_seen(first);
      };
      const bool second = seen(block.begin[1]);
      if (second && seen(block.begin[0])) {
        masked_part<kKeys>(block, 0, position);
      } else {
        masked_part<kBoxRows>({.begin = {second ? block.begin[1] : block.begin[0]},
                               .floor = block.floor,
                               .ceiling = block.ceiling,
                               .window = block.window},
                              second, position);
      }
    }
  }

  /// `count` blocks that all rows see whole; the log-sum-exp alone needs only their scores.
  __device__ __forceinline__ void score_full(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      find_scores<kKeys>(0);
      rows.soften(scores, factor);
    }
  }

  /// The same with values: the weights of a block wait until the scores of the next are on the way.
  __device__ __forceinline__ void attend_full(int count) {
    find_scores<kKeys>(0);
    rows.soften(scores, factor);
    rows.decay_out();
    pack_weights<kKeys>();
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const Place keys = await_stage();
      await_turn();
      multiply_keys<T, kKeys>(scores, queries, shared.stages[keys.index], kPanelBytes);
      const Place values = await_stage();
      multiply_values<T, kKeys, kDim>(rows.out, weights, shared.stages[values.index], kPanelBytes);
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::pin(scores);
      release(keys);
      rows.soften(scores, factor);
      ptx::wgmma_wait<0>();
      ptx::pin(rows.out);
      release(values);
      rows.decay_out();
      pack_weights<kKeys>();
    }
    const Place values = await_stage();
    multiply_values<T, kKeys, kDim>(rows.out, weights, shared.stages[values.index], kPanelBytes);
    ptx::wgmma_wait<0>();
    ptx::pin(rows.out);
    release(values);
  }

  __device__ __forceinline__ void run() {
    RingPlace<Memory::kTiles> tile;
    if (warpgroup == 1) pass_turn();  // the first begins
    while (true) {
      shared.queries_full[tile.index].wait(tile.parity);
      const Work<kKeys>& work = shared.work[tile.index];
      if (work.height == 0) return;
      queries.load(shared.queries[tile.index] + warpgroup * Memory::kPanels * kBoxBytes,
                   threadIdx.x % kWarpgroup);
      rows.clear();
      const int masked = work.blocks.masked;
      const int total = work.blocks.total;
#pragma unroll 1
      for (int i = 0; i < masked; ++i) masked_step(work.blocks.at(i), work.position);
      if constexpr (!kValues) {
        score_full(total - masked);
      } else if (masked < total) {
        attend_full(total - masked);
      }
      rows.template store<kValues>(params, work, row);
      shared.queries_empty[tile.index].arrive();  // by every thread: each has read the work
      tile.advance();
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
