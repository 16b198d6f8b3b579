#include "csrc/ops/select_tiles.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select_tiles.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/index.h"

namespace rtpurbo {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result select_tiles_cpu(const at::Tensor& q_index, const at::Tensor& k_index,
                        at::IntArrayRef index_map, const at::Tensor& threshold, int64_t window,
                        int64_t sinks, int64_t min_blocks, int64_t tile, int64_t block_size,
                        const MaybeTensor& near_lse, const MaybeTensor& offset,
                        const MaybeTensor& start, int64_t capacity, std::string_view rank) {
  constexpr const char* kOp = "select_tiles";
  check_index(kOp, q_index, k_index, index_map);
  TORCH_CHECK_VALUE(k_index.size(2) >= q_index.size(2),
                    "rtpurbo::select_tiles: k_index must hold at least the keys of the ",
                    q_index.size(2), " query rows, got N = ", k_index.size(2));
  check_mask(kOp, window, sinks, 1.0);
  TORCH_CHECK_VALUE(min_blocks >= 0, "rtpurbo::select_tiles: min_blocks must be >= 0, got ",
                    min_blocks);
  TORCH_CHECK_VALUE(tile >= 1, "rtpurbo::select_tiles: tile must be >= 1, got ", tile);
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::select_tiles: block_size must be >= 1, got ",
                    block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select_tiles: capacity must be >= 0, got ", capacity);
  TORCH_CHECK_VALUE(rank == "sum" || rank == "max",
                    "rtpurbo::select_tiles: rank must be 'sum' or 'max', got '", rank, "'");
  check_start(kOp, start, q_index.size(0), q_index);
  const at::ScalarType accum = accumulation_type(q_index, k_index);
  const at::Tensor near = per_row(kOp, near_lse, q_index, accum);
  const at::Tensor offsets = per_head(kOp, "offset", offset, q_index, accum);
  const at::Tensor thresholds = per_head(kOp, "threshold", threshold, q_index, accum);

  const int64_t keys = k_index.size(2);
  const int64_t tiles = (q_index.size(2) + tile - 1) / tile;
  const int64_t room = capacity > 0 ? capacity : (keys + block_size - 1) / block_size;
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor indices = at::empty({q_index.size(0), q_index.size(1), tiles, room}, ints);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), tiles}, ints);
  const at::Tensor mass = at::empty(counts.sizes(), q_index.options().dtype(accum));
  at::Tensor start_kept;
  cpu::select_tiles_kernel({.q_dtype = q_index.scalar_type(),
                            .k_dtype = k_index.scalar_type(),
                            .accum = accum,
                            .q_index = heads_view(q_index),
                            .k_index = heads_view(k_index),
                            .index_map = index_map.data(),
                            .threshold_ptr = thresholds.const_data_ptr(),
                            .near_lse_ptr = data_or_null(near),
                            .offset_ptr = data_or_null(offsets),
                            .start_ptr = start_ptr(start, start_kept),
                            .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                            .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                            .mass_ptr = mass.mutable_data_ptr(),
                            .batch = q_index.size(0),
                            .heads = q_index.size(1),
                            .rows = q_index.size(2),
                            .keys = keys,
                            .dim = q_index.size(3),
                            .tiles = tiles,
                            .capacity = room,
                            .window = std::min(window, keys),
                            .sinks = std::min(sinks, keys),
                            .min_blocks = min_blocks,
                            .tile = tile,
                            .block_size = block_size,
                            .rank_by_max = rank == "max"});
  return {indices, counts, mass};
}

}  // namespace

Result select_tiles(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                    const at::Tensor& threshold, int64_t window, int64_t sinks, int64_t min_blocks,
                    int64_t tile, int64_t block_size, const MaybeTensor& near_lse,
                    const MaybeTensor& offset, const MaybeTensor& start, int64_t capacity,
                    std::string_view rank) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::select_tiles", "")
                             .typed<decltype(select_tiles)>();
  return op.call(q_index, k_index, index_map, threshold, window, sinks, min_blocks, tile,
                 block_size, near_lse, offset, start, capacity, rank);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "select_tiles(Tensor q_index, Tensor k_index, int[] index_map, Tensor threshold, int window,"
      " int sinks, int min_blocks, int tile=128, int block_size=64, Tensor? near_lse=None,"
      " Tensor? offset=None, Tensor? start=None, int capacity=0, str rank=\"sum\")"
      " -> (Tensor block_indices, Tensor block_counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("select_tiles", &select_tiles_cpu); }

}  // namespace rtpurbo
