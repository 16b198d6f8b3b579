#include <algorithm>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/integers.h"
#include "csrc/cuda/select_tiles.h"
#include "csrc/cuda/select_tiles/choose.cuh"
#include "csrc/cuda/select_tiles/mma_scores.cuh"
#include "csrc/cuda/select_tiles/near_masses.cuh"
#include "csrc/cuda/select_tiles/plain_scores.cuh"
#include "csrc/cuda/select_tiles/pool.cuh"
#include "csrc/cuda/select_tiles/totals.cuh"
#include "csrc/cuda/workspace.h"
#ifdef RTPURBO_WITH_SM90
#include "csrc/cuda/prefers_portable.h"
#include "csrc/cuda/sm90/tile_maxima.h"
#endif

namespace rtpurbo::cuda {
namespace {

using tiles::Workspace;

constexpr int64_t kBytesAtOnce = 576 << 20;
constexpr int64_t kBand = 4;
constexpr int64_t kPortableChunk = 64;
constexpr int64_t kMaxGrid = INT32_MAX;
constexpr int kMostKeptBytes = 88 << 10;  // every device has that much for a thread block

/// Without block sizes and tiles beyond what there is.
SelectTilesParams normalised(SelectTilesParams p) {
  p.block_size = std::min(p.block_size, p.keys);
  p.tile = std::min(p.tile, p.rows);
  p.min_blocks = std::min<int64_t>(p.min_blocks, INT32_MAX);
  return p;
}

bool suits_tensor_cores(const SelectTilesParams& p) {
  const auto suits = [](ElementType type, const HeadsView& view) {
    return type == ElementType::kFloat16 && rows_are_aligned(view, sizeof(uint16_t));
  };
  return p.dim == tiles::kDim && p.block_size == tiles::kBlock &&
         p.keys <= INT32_MAX - tiles::mma::kStep && p.k_index.row_stride == p.dim &&
         suits(p.q_type, p.q_index) && suits(p.k_type, p.k_index);
}

/// Whether stage 1 is the one that keeps maxima in fp16.
bool takes_maxima(const SelectTilesParams& p) {
#ifdef RTPURBO_WITH_SM90
  return suits_tensor_cores(p) && !prefers_portable() && sm90::takes_tile_maxima(p);
#else
  return false;
#endif
}

int64_t chunk_blocks(const Workspace& w) {
#ifdef RTPURBO_WITH_SM90
  if (w.halves) return sm90::kMaximaChunk;
#endif
  return kPortableChunk;
}

/// Of one tile.
int64_t mass_bytes(const Workspace& w) {
  return w.halves ? w.quads * w.height * static_cast<int64_t>(sizeof(uint2))
                  : w.blocks * w.height * static_cast<int64_t>(sizeof(float));
}

/// Takes the workspace apart, or with a null base only measures it.
size_t lay_out(char* base, Workspace& w) {
  const int64_t slots = w.pairs * w.tiles;
  WorkspaceParts parts{base};
  uint2* masses;
  parts.take(masses, divide_up(slots * mass_bytes(w), sizeof(uint2)));
  w.masses = masses;
  parts.take(w.far, slots * w.chunks * w.height);
  parts.take(w.near, slots * w.chunks * w.height);
  parts.take(w.totals, slots * w.height);
  parts.take(w.near_lse, slots * w.height);
  parts.take(w.weights, slots * w.blocks);
  return parts.bytes;
}

/// All tiles of a few pairs, or a few tiles of one.
Workspace sizes(const SelectTilesParams& p) {
  Workspace w{};
  w.halves = takes_maxima(p);
  w.blocks = divide_up(p.keys, p.block_size);
  w.quads = divide_up(w.blocks, tiles::kQuad);
  w.chunk_blocks = chunk_blocks(w);
  w.chunks = divide_up(w.blocks, w.chunk_blocks);
  w.height = round_up(p.tile, 32);
  w.pairs = w.tiles = 1;
  const auto slot_bytes = static_cast<int64_t>(lay_out(nullptr, w));
  int64_t fitting = std::max<int64_t>(1, kBytesAtOnce / slot_bytes);
  // Launches of equal size, and of whole bands: thread blocks score a few tiles at a time.
  if (fitting > kBand) fitting = fitting / kBand * kBand;
  const int64_t launches = divide_up(p.all_tiles, fitting);
  w.tiles = std::min({round_up(divide_up(p.all_tiles, launches), kBand), fitting, p.all_tiles});
  w.pairs = std::min(fitting / w.tiles, p.batch * p.heads);
  return w;
}

cudaError_t launch_mma_scores(const SelectTilesParams& p, const Workspace& w, cudaStream_t stream) {
  const int64_t groups = w.pairs * w.tiles * (w.height / tiles::mma::kRows);
  const int64_t grid = divide_up(groups, tiles::mma::kWarps) * w.chunks;
  if (grid > kMaxGrid) return cudaErrorInvalidConfiguration;
  const bool near = p.near_lse_ptr == nullptr;
  const auto kernel =
      p.rank_by_max
          ? (near ? tiles::mma_scores_kernel<true, true> : tiles::mma_scores_kernel<true, false>)
          : (near ? tiles::mma_scores_kernel<false, true> : tiles::mma_scores_kernel<false, false>);
  kernel<<<static_cast<unsigned>(grid), tiles::mma::kThreads, 0, stream>>>(p, w);
  return cudaGetLastError();
}

template <typename TK>
cudaError_t launch_plain_scores(const SelectTilesParams& p, const Workspace& w,
                                cudaStream_t stream) {
  const int64_t grid = w.pairs * w.tiles * (w.height / tiles::plain::kRows) * w.chunks;
  if (grid > kMaxGrid) return cudaErrorInvalidConfiguration;
  const size_t shared = tiles::plain::shared_bytes(p.dim);
  const auto kernel = tiles::plain_scores_kernel<TK>;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared))) {
    return error;
  }
  kernel<<<static_cast<unsigned>(grid), tiles::plain::kThreads, shared, stream>>>(p, w);
  return cudaGetLastError();
}

cudaError_t launch_scores(const SelectTilesParams& p, const Workspace& w, cudaStream_t stream) {
#ifdef RTPURBO_WITH_SM90
  if (w.halves) return sm90::launch_tile_maxima(p, w, stream);
#endif
  if (suits_tensor_cores(p)) return launch_mma_scores(p, w, stream);
  return dispatch_element(
      p.k_type, [&](auto element) { return launch_plain_scores<decltype(element)>(p, w, stream); });
}

cudaError_t launch_choose(const SelectTilesParams& p, const Workspace& w, cudaStream_t stream) {
  const int64_t bytes = w.blocks * static_cast<int64_t>(sizeof(float));
  const bool keeps_weights = bytes <= kMostKeptBytes;
  const int shared = keeps_weights ? static_cast<int>(bytes) : 0;
  // Always the same limit: another thread may be launching.
  if (const cudaError_t error = cudaFuncSetAttribute(
          tiles::choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostKeptBytes)) {
    return error;
  }
  const auto grid = static_cast<unsigned>(w.pairs * w.tiles);
  tiles::choose_kernel<<<grid, tiles::kChooseThreads, shared, stream>>>(p, w, keeps_weights);
  return cudaGetLastError();
}

cudaError_t launch_slots(const SelectTilesParams& p, const Workspace& w, cudaStream_t stream) {
  if (const cudaError_t error = launch_scores(p, w, stream)) return error;
  const int64_t slots = w.pairs * w.tiles;
  const auto grid = [](int64_t blocks) { return static_cast<unsigned>(blocks); };
  tiles::totals_kernel<<<grid(slots * (w.height / tiles::kTotalsRows)), tiles::kTotalsThreads, 0,
                         stream>>>(p, w);
  const bool rows_128 = w.height == 128;
  const auto pool = w.halves ? tiles::pool_kernel<tiles::Halves, 4>
                             : (rows_128 ? tiles::pool_kernel<tiles::Floats, 4>
                                         : tiles::pool_kernel<tiles::Floats, 0>);
  pool<<<grid(slots * divide_up(w.blocks, tiles::kPoolBlocks)), tiles::kPoolThreads, 0, stream>>>(
      p, w);
  return launch_choose(p, w, stream);
}

/// Of near masses that stage 1 does not sum up; others are given, or its own.
int64_t near_rows(const SelectTilesParams& p, const Workspace& w) {
  return w.halves && !p.near_lse_ptr ? p.batch * p.heads * p.rows : 0;
}

size_t lay_out(const SelectTilesParams& p, char* base, Workspace& w, float*& near) {
  WorkspaceParts parts{base, lay_out(base, w)};
  parts.take(near, near_rows(p, w));
  return parts.bytes;
}

/// Makes them, and the parameters as if they were given.
cudaError_t give_near(SelectTilesParams& p, float* near, cudaStream_t stream) {
  const int64_t runs = p.batch * p.heads * divide_up(p.rows, tiles::kNearRows);
  const int64_t grid = divide_up(runs, tiles::kNearWarps);
  if (grid > kMaxGrid) return cudaErrorInvalidConfiguration;
  tiles::near_masses_kernel<<<static_cast<unsigned>(grid), 32 * tiles::kNearWarps, 0, stream>>>(
      p, near);
  p.near_lse_ptr = near;
  p.offset_ptr = nullptr;  // all scores lack it
  return cudaGetLastError();
}

}  // namespace

size_t select_tiles_workspace(const SelectTilesParams& params) {
  const SelectTilesParams p = normalised(params);
  Workspace w = sizes(p);
  float* near;
  return lay_out(p, nullptr, w, near);
}

cudaError_t launch_select_tiles(const SelectTilesParams& params, void* workspace,
                                cudaStream_t stream) {
  SelectTilesParams p = normalised(params);
  Workspace w = sizes(p);
  float* near;
  lay_out(p, static_cast<char*>(workspace), w, near);
  if (near_rows(p, w) > 0) {
    if (const cudaError_t error = give_near(p, near, stream)) return error;
  }
  const int64_t all_pairs = p.batch * p.heads, pairs = w.pairs, tiles = w.tiles;
  for (w.first_pair = 0; w.first_pair < all_pairs; w.first_pair += pairs) {
    w.pairs = std::min(pairs, all_pairs - w.first_pair);
    for (w.first_tile = 0; w.first_tile < p.all_tiles; w.first_tile += tiles) {
      w.tiles = std::min(tiles, p.all_tiles - w.first_tile);
      if (const cudaError_t error = launch_slots(p, w, stream)) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace rtpurbo::cuda
