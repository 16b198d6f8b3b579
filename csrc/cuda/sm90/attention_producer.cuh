#pragma once
// A thread takes row tiles off the queue, and one of each team starts the copies of its blocks in
// the order in which it needs them: K and V of each masked block; then K of a block before V of the
// last.

#include <type_traits>

#include "csrc/cuda/ptx/tma.cuh"
#include "csrc/cuda/sm90/attention_maps.h"
#include "csrc/cuda/sm90/attention_shared.cuh"
#include "csrc/cuda/sm90/work_queue.h"

namespace rtpurbo::cuda::sm90 {

/// Fills in work in shared memory; the thread has few registers.
template <int kKeys>
__device__ void find_work(const AttentionParams& params, const WorkQueue& queue, uint32_t item,
                          Work<kKeys>& work) {
  if (item >= queue.items) {
    work.height = 0;
    return;
  }
  const bool near = item >= queue.retrieval_items;
  if (near) item -= queue.retrieval_items;
  const WorkQueue::Role& role = near ? queue.near : queue.retrieval;
  const bool split = role.parts > 1;
  work.part = split ? static_cast<int>(role.first_part + item) : -1;
  const uint32_t part = split ? item % role.parts : 0;
  if (split) item /= role.parts;
  const WorkQueue::Tile place = queue.tile(role, item);
  const HeadJob& job = params.heads.jobs[place.job];
  const int tile = static_cast<int>(place.number);

  work.job = job;
  work.batch = static_cast<int>(place.batch);
  work.row = tile * kTileRows;
  work.height = min(kTileRows, params.rows - work.row);
  work.position = work.row + (job.from_local ? params.local_keys : params.keys) - params.rows;
  find_key_blocks(params, job, work.batch, tile, work.position, work.height, work.blocks);
  if (split) work.blocks.take_part(static_cast<int>(part), static_cast<int>(role.parts));
}

template <int kDim, bool kValues>
struct Producer {
  using Memory = Shared<kDim>;
  static constexpr int kKeys = Memory::kKeys;
  static constexpr int kBoxes = kKeys / kBoxRows;

  static constexpr int kTeams = Memory::kTeams;
  using Ring = std::remove_reference_t<decltype(Memory::rings[0])>;

  const AttentionMaps& maps;
  Memory& shared;
  Ring& ring;  // of the team
  const int team;
  RingPlace<Ring::kSize> stage;

  __device__ void load_queries(const Work<kKeys>& work, int tile) {
    ptx::Mbarrier& full = shared.queries_full[tile];
    full.arrive_expect(Memory::kQueryBytes);
#pragma unroll
    for (int box = 0; box < kConsumers * Memory::kPanels; ++box) {
      const int rows = box / Memory::kPanels;
      const int panel = box % Memory::kPanels;
      ptx::load_box(shared.queries[tile] + box * kBoxBytes, maps.q, panel * kBoxColumns,
                    work.row + rows * kConsumerRows, work.job.head, work.batch, full);
    }
  }

  __device__ void load_keys(const CUtensorMap& map, const Work<kKeys>& work,
                            const KeyBlock<kBoxes>& block) {
    ring.empty[stage.index].wait(stage.parity ^ 1);
    ptx::Mbarrier& full = ring.full[stage.index];
    full.arrive_expect(Ring::kBytes);
#pragma unroll
    for (int panel = 0; panel < Memory::kPanels; ++panel) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        ptx::load_box(ring.stages[stage.index] + (panel * kBoxes + box) * kBoxBytes, map,
                      panel * kBoxColumns, block.begin[box], work.job.kv_head, work.batch, full);
      }
    }
    stage.advance();
  }

  /// The team's blocks of a tile, the first of them given.
  __device__ void load_tile(const Work<kKeys>& work, int first) {
    const CUtensorMap& k_map = work.job.from_local ? maps.k_local : maps.k;
    const CUtensorMap& v_map = work.job.from_local ? maps.v_local : maps.v;
    const KeyBlocks<kKeys>& blocks = work.blocks;
    int i = first;
    for (; i < blocks.masked; i += kTeams) {
      const KeyBlock<kBoxes> block = blocks.at(i);
      load_keys(k_map, work, block);
      if constexpr (kValues) load_keys(v_map, work, block);
    }
    if (i >= blocks.total) return;
    KeyBlock<kBoxes> block = blocks.at(i);
    load_keys(k_map, work, block);
    for (i += kTeams; i < blocks.total; i += kTeams) {
      const KeyBlock<kBoxes> next = blocks.at(i);
      load_keys(k_map, work, next);
      if constexpr (kValues) load_keys(v_map, work, block);
      block = next;
    }
    if constexpr (kValues) load_keys(v_map, work, block);
  }

  /// The first team's thread finds the work of all.
  __device__ void run(const AttentionParams& params, const WorkQueue& queue) {
    RingPlace<Memory::kTiles> tile;
    uint32_t item = blockIdx.x;
    while (true) {
      Work<kKeys>& work = shared.work[tile.index];
      if (kTeams == 1 || team == 0) {
        shared.queries_empty[tile.index].wait(tile.parity ^ 1);
        find_work(params, queue, item, work);
        if constexpr (kTeams > 1) shared.work_full[tile.index].arrive();
        if (work.height == 0) {
          shared.queries_full[tile.index].arrive();
          return;
        }
        load_queries(work, tile.index);
        item = gridDim.x + atomicAdd(params.ticket_ptr, 1u);
      } else {
        shared.work_full[tile.index].wait(tile.parity);
        if (work.height == 0) return;
      }
      load_tile(work, first_block<kDim>(team, tile.index));
      if (kTeams > 1 && team > 0) shared.queries_empty[tile.index].arrive();
      tile.advance();
    }
  }
};

}  // namespace rtpurbo::cuda::sm90
