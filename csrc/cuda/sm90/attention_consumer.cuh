#pragma once
// A warpgroup computes 64 rows of each tile, with the keys of its team. While it runs the softmax
// of one block, the tensor cores serve the others and, of a single team, first multiply the values
// of the block before.

#include <type_traits>

#include "csrc/cuda/ptx/tma.cuh"
#include "csrc/cuda/sm90/attention_maps.h"
#include "csrc/cuda/sm90/attention_parts.cuh"
#include "csrc/cuda/sm90/attention_poison.cuh"
#include "csrc/cuda/sm90/attention_products.cuh"
#include "csrc/cuda/sm90/attention_rows.cuh"

namespace rtpurbo::cuda::sm90 {

template <typename T, int kDim, bool kValues>
struct Consumer {
  using Memory = Shared<kDim>;
  using Ring = std::remove_reference_t<decltype(Memory::rings[0])>;
  using Place = RingPlace<Ring::kSize>;
  static constexpr int kTeams = Memory::kTeams;
  static constexpr int kKeys = Memory::kKeys;
  static constexpr int kBoxes = kKeys / kBoxRows;
  static constexpr int kPanelBytes = kBoxes * kBoxBytes;

  const AttentionParams& params;
  const AttentionMaps& maps;
  Memory& shared;
  Ring& ring;          // of the team
  const float factor;  // scale log2(e)
  const int team;
  const int warpgroup;  // of the team
  const int row;        // the first of the thread's two rows in the tile; the other is 8 below
  Place stage;

  // At 256, and for two teams, they do not fit into registers; without values ptxas serialises such
  // products (C7511).
  static constexpr bool kHoldsQueries = kValues && kDim == 128;
  Queries<kDim, kHoldsQueries> queries;
  float scores[kKeys / 2];
  uint32_t weights[kKeys / kStep][4];
  Rows<T, kDim> rows;

  // Named barriers: 0 is that of all threads, then those of turns, then those of one warpgroup.
  __device__ ptx::NamedBarrier turn_of(int consumer) const {
    return {1 + team * kConsumers + consumer, kConsumers * kWarpgroup};
  }
  __device__ ptx::NamedBarrier of_warpgroup() const {
    return {1 + (kTeams + team) * kConsumers + warpgroup, kWarpgroup};
  }

  /// Without values the two take turns in starting their products. With values the tensor cores are
  /// busier, by 2 to 3 %, where they come as they are ready; only the compiler keeps them in order.
  __device__ void await_turn() const {
    if constexpr (kValues) {
      asm volatile("" ::: "memory");
    } else {
      turn_of(warpgroup).sync();
    }
  }
  __device__ void pass_turn() const {
    if constexpr (kValues) {
      asm volatile("" ::: "memory");
    } else {
      turn_of(warpgroup ^ 1).arrive();
    }
  }

  __device__ Place await_stage() {
    const Place place = stage;
    ring.full[place.index].wait(place.parity);
    stage.advance();
    return place;
  }
  __device__ void release(const Place& place) {
    if (threadIdx.x % 32 == 0) ring.empty[place.index].arrive();
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

  /// scores = Q K^T for kWidth keys from a box of a stage on.
  template <int kWidth>
  __device__ __forceinline__ void find_scores(int box) {
    const Place keys = await_stage();
    await_turn();
    multiply_keys<T, kWidth>(first_scores<kWidth>(), queries,
                             ring.stages[keys.index] + box * kBoxBytes, kPanelBytes);
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
      const unsigned char* bytes = ring.stages[values.index] + box * kBoxBytes;
      if (is_poisoned<T, kWidth, kDim>(bytes, kPanelBytes, of_warpgroup())) {
        add_seen_values<T, kWidth, kDim>(rows.out, first_scores<kWidth>(), bytes, kPanelBytes,
                                         block, position + row);
      } else {
        pack_weights<kWidth>();
        multiply_values<T, kWidth, kDim>(rows.out, weights, bytes, kPanelBytes);
        ptx::wgmma_wait<0>();
        ptx::pin(rows.out);
      }
      __syncwarp();
      release(values);
    }
  }

  /// A block of which this warpgroup's rows see nothing.
  __device__ __forceinline__ void skip_step() {
#pragma unroll
    for (int i = 0; i < (kValues ? 2 : 1); ++i) {
      const Place place = await_stage();
      await_turn();
      pass_turn();
      __syncwarp();
      release(place);
    }
  }

  /// A masked block: all of it, or one of two boxes where this warpgroup's rows see no more.
  __device__ __forceinline__ void masked_step(const KeyBlock<kBoxes>& block, int position) {
    const int first = position + warpgroup * kConsumerRows;
    const auto seen = [&](int box) {
      return block.begin[box] <= block.last_seen(first + kConsumerRows - 1) &&
             block.begin[box] + kBoxRows > block.first_seen(first);
    };
    if constexpr (kBoxes == 1) {
      if (seen(0)) {
        masked_part<kKeys>(block, 0, position);
      } else {
        skip_step();
      }
    } else {
      const bool second = seen(1);
      if (second && seen(0)) {
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

  /// The weights of a block whose scores were overwritten by such as are too large.
  __device__ __forceinline__ void soften_anew(const Place& keys, int tile) {
    multiply_keys_alone<T, kKeys, kDim>(
        scores, shared.queries[tile] + warpgroup * Memory::kPanels * kBoxBytes,
        ring.stages[keys.index], kPanelBytes);
    rows.soften(scores, factor);
    __syncwarp();  // behind the last read of the keys
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
  __device__ __forceinline__ void attend_full(int count, int tile) {
    find_scores<kKeys>(0);
    rows.soften(scores, factor);
    rows.decay_out();
    pack_weights<kKeys>();
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      const Place keys = await_stage();
      await_turn();
      multiply_keys<T, kKeys>(scores, queries, ring.stages[keys.index], kPanelBytes);
      const Place values = await_stage();
      multiply_values<T, kKeys, kDim>(rows.out, weights, ring.stages[values.index], kPanelBytes);
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::pin(scores);
      int decays = !rows.soften_as_before(scores, factor);
      if (decays) soften_anew(keys, tile);
      release(keys);
      // One wait, for all warps of a warpgroup, must stay between the two branches.
      asm volatile("" : "+r"(decays));
      ptx::wgmma_wait<0>();
      ptx::pin(rows.out);
      release(values);
      if (decays) rows.decay_out();
      pack_weights<kKeys>();
    }
    const Place values = await_stage();
    multiply_values<T, kKeys, kDim>(rows.out, weights, ring.stages[values.index], kPanelBytes);
    ptx::wgmma_wait<0>();
    ptx::pin(rows.out);
    release(values);
  }

  /// For the other team, which stores the rows of this tile.
  __device__ __forceinline__ void hand_over(int place) {
    auto& exchange = shared.exchange[warpgroup];
    const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      exchange.maximum[h][thread] = rows.maximum[h];
      exchange.sum[h][thread] = rows.sum[h];
    }
    if constexpr (kValues) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) exchange.out[i][thread] = rows.out[i];
    }
    exchange.full[place].arrive();
  }

  /// Adds what the other team found; this one is the next to write there, for the next tile.
  __device__ __forceinline__ void take_over(const RingPlace<Memory::kTiles>& tile) {
    auto& exchange = shared.exchange[warpgroup];
    const int thread = threadIdx.x % kWarpgroup;
    exchange.full[tile.index].wait(tile.parity);
    float share[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      share[h] = rows.add(h, exchange.maximum[h][thread], exchange.sum[h][thread], factor);
    }
    if constexpr (kValues) {
      rows.decay_out();
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) {
        rows.out[i] = fmaf(exchange.out[i][thread], share[i / 2 % 2], rows.out[i]);
      }
    }
  }

  /// Ends the tile's rows. The output leaves by way of the queries, of which a warp needs only
  /// those of its own rows, and these no more.
  __device__ __forceinline__ void store(const Work<kKeys>& work, int tile) {
    rows.template finish<kValues>(params, work, row);
    if constexpr (kValues) {
      if (work.part >= 0) {
        rows.store_part(Parts<kDim>(params.parts_ptr).out(work.part), row, work.height);
        return;
      }
      const int first = threadIdx.x / 32 % 4 * kWarpRows;
      unsigned char* queries = shared.queries[tile] + warpgroup * Memory::kPanels * kBoxBytes;
      unsigned char* warp_rows = queries + first * kBoxColumns * 2;
      if constexpr (!kHoldsQueries) of_warpgroup().sync();  // behind the last products
      rows.stage_out(warp_rows);
      ptx::fence_shared_writes();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int panel = 0; panel < Memory::kPanels; ++panel) {
          ptx::store_box(maps.out, panel * kBoxColumns,
                         work.row + warpgroup * kConsumerRows + first, work.job.head, work.batch,
                         warp_rows + panel * kBoxBytes);
        }
        ptx::commit_stores();
      }
    }
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
      const int first = first_block<kDim>(team, tile.index);
      const auto mine = [&](int count) { return (count - first + kTeams - 1) / kTeams; };
      const int masked = mine(work.blocks.masked);
      const int full = mine(work.blocks.total) - masked;
#pragma unroll 1
      for (int i = 0; i < masked; ++i) {
        masked_step(work.blocks.at(i * kTeams + first), work.position);
      }
      if constexpr (!kValues) {
        score_full(full);
      } else if (full > 0) {
        attend_full(full, tile.index);
      }
      if constexpr (kTeams > 1) {
        static_assert(Memory::kTiles == 2);  // so that the teams take turns
        if (first == 0) {
          hand_over(tile.index);
        } else {
          take_over(tile);
        }
      }
      if (kTeams == 1 || first == 1) store(work, tile.index);
      if constexpr (kValues) {
        if (threadIdx.x % 32 == 0) ptx::wait_for_stored_boxes();
      }
      shared.queries_empty[tile.index].arrive();  // by every thread: work and queries are read
      tile.advance();
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
