#include "csrc/ops/select_tiles.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select_tiles.h"
#include "csrc/ops/common/index.h"

namespace rtpurbo {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result select_tiles_cpu(const at::Tensor& q_index, const at::Tensor& k_index,
                        at::IntArrayRef index_map, const at::Tensor& threshold, int64_t window,
                        int64_t sinks, int64_t min_blocks, int64_t tile, int64_t block_size,
                        const MaybeTensor& near_lse, const MaybeTensor& offset,
                        const MaybeTensor& start, int64_t capacity, std::string_view rank,
                        const MaybeTensor& codes, const MaybeTensor& ranges) {
  constexpr const char* kOp = "select_tiles";
  TORCH_CHECK_VALUE(min_blocks >= 0, "rtpurbo::select_tiles: min_blocks must be >= 0, got ",
                    min_blocks);
  TORCH_CHECK_VALUE(tile >= 1, "rtpurbo::select_tiles: tile must be >= 1, got ", tile);
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::select_tiles: block_size must be >= 1, got ",
                    block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select_tiles: capacity must be >= 0, got ", capacity);
  TORCH_CHECK_VALUE(rank == "sum" || rank == "max",
                    "rtpurbo::select_tiles: rank must be 'sum' or 'max', got '", rank, "'");
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges});
  const at::ScalarType accum = arguments.params().accum;
  const at::Tensor thresholds = per_head(kOp, "threshold", threshold, q_index, accum);

  const int64_t tiles = (q_index.size(2) + tile - 1) / tile;
  const int64_t room = arguments.room(capacity);
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor indices = at::empty({q_index.size(0), q_index.size(1), tiles, room}, ints);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), tiles}, ints);
  const at::Tensor mass = at::empty(counts.sizes(), q_index.options().dtype(accum));
  cpu::select_tiles_kernel({.index = arguments.params(),
                            .threshold_ptr = thresholds.const_data_ptr(),
                            .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                            .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                            .mass_ptr = mass.mutable_data_ptr(),
                            .tiles = tiles,
                            .capacity = room,
                            .min_blocks = min_blocks,
                            .tile = tile,
                            .rank_by_max = rank == "max"});
  return {indices, counts, mass};
}

}  // namespace

Result select_tiles(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                    const at::Tensor& threshold, int64_t window, int64_t sinks, int64_t min_blocks,
                    int64_t tile, int64_t block_size, const MaybeTensor& near_lse,
                    const MaybeTensor& offset, const MaybeTensor& start, int64_t capacity,
                    std::string_view rank, const MaybeTensor& codes, const MaybeTensor& ranges) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::select_tiles", "")
                             .typed<decltype(select_tiles)>();
  return op.call(q_index, k_index, index_map, threshold, window, sinks, min_blocks, tile,
                 block_size, near_lse, offset, start, capacity, rank, codes, ranges);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "select_tiles(Tensor q_index, Tensor k_index, int[] index_map, Tensor threshold, int window,"
      " int sinks, int min_blocks, int tile=128, int block_size=64, Tensor? near_lse=None,"
      " Tensor? offset=None, Tensor? start=None, int capacity=0, str rank=\"sum\","
      " Tensor? codes=None, Tensor? ranges=None)"
      " -> (Tensor block_indices, Tensor block_counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("select_tiles", &select_tiles_cpu); }

}  // namespace rtpurbo
