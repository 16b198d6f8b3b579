#include "csrc/ops/select_tiles.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/cpu/select_tiles.h"
#include "csrc/ops/common/index.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/limits.h"
#include "csrc/cuda/select_tiles.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "select_tiles";

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

void check_tiles(int64_t min_blocks, int64_t tile, int64_t block_size, int64_t capacity,
                 std::string_view rank) {
  TORCH_CHECK_VALUE(min_blocks >= 0, "rtpurbo::select_tiles: min_blocks must be >= 0, got ",
                    min_blocks);
  TORCH_CHECK_VALUE(tile >= 1, "rtpurbo::select_tiles: tile must be >= 1, got ", tile);
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::select_tiles: block_size must be >= 1, got ",
                    block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select_tiles: capacity must be >= 0, got ", capacity);
  TORCH_CHECK_VALUE(rank == "sum" || rank == "max",
                    "rtpurbo::select_tiles: rank must be 'sum' or 'max', got '", rank, "'");
}

int64_t tile_count(const at::Tensor& q_index, int64_t tile) {
  return q_index.size(2) / tile + (q_index.size(2) % tile != 0);
}

Result allocate(const at::Tensor& q_index, int64_t tiles, int64_t room, at::ScalarType mass_type) {
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), tiles}, ints);
  return {at::empty({q_index.size(0), q_index.size(1), tiles, room}, ints), counts,
          at::empty(counts.sizes(), q_index.options().dtype(mass_type))};
}

Result select_tiles_cpu(const at::Tensor& q_index, const at::Tensor& k_index,
                        at::IntArrayRef index_map, const at::Tensor& threshold, int64_t window,
                        int64_t sinks, int64_t min_blocks, int64_t tile, int64_t block_size,
                        const MaybeTensor& near_lse, const MaybeTensor& offset,
                        const MaybeTensor& start, int64_t capacity, std::string_view rank,
                        const MaybeTensor& codes, const MaybeTensor& ranges) {
  check_tiles(min_blocks, tile, block_size, capacity, rank);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges});
  const at::ScalarType accum = arguments.params().accum;
  const at::Tensor thresholds = per_head(kOp, "threshold", threshold, q_index, accum);

  const int64_t tiles = tile_count(q_index, tile);
  const int64_t room = arguments.room(capacity);
  const Result result = allocate(q_index, tiles, room, accum);
  const auto& [indices, counts, mass] = result;
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
  return result;
}

#ifdef RTPURBO_WITH_CUDA
/// The tensor-core kernels read keys that follow each other.
at::Tensor packed_rows(const at::Tensor& k_index) {
  const bool packed = k_index.dim() != 4 || k_index.stride(2) == k_index.size(3);
  return packed ? k_index : k_index.contiguous();
}

Result select_tiles_cuda(const at::Tensor& q_index, const at::Tensor& k_index,
                         at::IntArrayRef index_map, const at::Tensor& threshold, int64_t window,
                         int64_t sinks, int64_t min_blocks, int64_t tile, int64_t block_size,
                         const MaybeTensor& near_lse, const MaybeTensor& offset,
                         const MaybeTensor& start, int64_t capacity, std::string_view rank,
                         const MaybeTensor& codes, const MaybeTensor& ranges) {
  check_tiles(min_blocks, tile, block_size, capacity, rank);
  const at::Tensor packed = packed_rows(k_index);
  const IndexArguments arguments(kOp, q_index, packed, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges});
  const cpu::IndexParams& in = arguments.params();
  const at::Tensor thresholds = per_head(kOp, "threshold", threshold, q_index, at::kFloat);
  cuda::check_index(kOp, in);
  TORCH_CHECK_VALUE(std::min(tile, in.rows) <= cuda::kMaxTile,
                    "rtpurbo::select_tiles: tile on CUDA must be <= ", cuda::kMaxTile, ", got ",
                    tile);
  // A prefill reads each key for many rows, so codes are spelt out once.
  if (codes) {
    return select_tiles_cuda(q_index, with_dequantised(packed, *codes, *ranges), index_map,
                             thresholds, window, sinks, min_blocks, tile, block_size, near_lse,
                             offset, start, capacity, rank, {}, {});
  }
  const int64_t tiles = tile_count(q_index, tile);
  const int64_t room = arguments.room(capacity);
  const Result result = allocate(q_index, tiles, room, at::kFloat);
  const auto& [indices, counts, mass] = result;
  if (counts.numel() == 0) return result;
  const c10::cuda::CUDAGuard guard(q_index.device());
  const cuda::SelectTilesParams params{.q_type = cuda::element_type(in.q_dtype),
                                       .k_type = cuda::element_type(in.k_dtype),
                                       .q_index = in.q_index,
                                       .k_index = in.k_index,
                                       .index_map = cuda::head_list(kOp, "index_map", index_map),
                                       .near_lse_ptr = static_cast<const float*>(in.near_lse_ptr),
                                       .offset_ptr = static_cast<const float*>(in.offset_ptr),
                                       .start_ptr = in.start_ptr,
                                       .threshold_ptr = thresholds.const_data_ptr<float>(),
                                       .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                                       .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                                       .mass_ptr = mass.mutable_data_ptr<float>(),
                                       .batch = in.batch,
                                       .heads = in.heads,
                                       .rows = in.rows,
                                       .keys = in.keys,
                                       .dim = in.dim,
                                       .window = in.window,
                                       .sinks = in.sinks,
                                       .all_tiles = tiles,
                                       .tile = tile,
                                       .block_size = block_size,
                                       .capacity = room,
                                       .min_blocks = min_blocks,
                                       .rank_by_max = rank == "max"};
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(cuda::select_tiles_workspace(params))},
                q_index.options().dtype(at::kByte));
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_select_tiles(params, workspace.mutable_data_ptr(),
                                                    c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

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
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("select_tiles", &select_tiles_cuda); }
#endif

}  // namespace rtpurbo
