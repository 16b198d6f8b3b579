#include <algorithm>
#include <cstdlib>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/decode.h"
#include "csrc/cuda/decode/merge.cuh"
#include "csrc/cuda/decode/split_mma.cuh"
#include "csrc/cuda/decode/split_simt.cuh"
#include "csrc/cuda/dependent_launch.h"
#include "csrc/cuda/integers.h"

namespace rtpurbo::cuda {
namespace {

/// Most keys that a set may read.
int64_t most_keys(const DecodeParams& p, const DecodeSet& set) {
  const int64_t window = set.near_window ? p.near_window : p.window;
  const int64_t most = set.from_local                  ? p.slots
                       : set.keys == DecodeKeys::kNear ? p.sinks + window
                                                       : p.length;
  return std::min(most, p.length);
}

size_t stats_bytes(const DecodeParams& p) {
  const int64_t bytes = p.batch * p.splits * p.slots_count * static_cast<int64_t>(sizeof(float2));
  return static_cast<size_t>(round_up(bytes, 256));
}

constexpr int kWarps = 4;
/// A warp takes as long for the weights of a tile whatever the length of its rows: short ones come
/// in larger tiles.
constexpr int tile_keys(int64_t dim) { return dim == 64 ? 32 : kProductKeys; }
template <int kDim>
constexpr int kStages = kDim <= 128 ? 3 : 2;
template <int kDim>
using Tile = MmaTile<kDim, kWarps, kStages<kDim>, tile_keys(kDim)>;

/// Whether a block's shared memory fits the current device.
template <int kDim>
bool tile_fits() {
  int device = 0;
  int most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         Tile<kDim>::kSharedBytes <= most;
}

template <typename T, int kDim>
cudaError_t launch_mma(const DecodeParams& p, const Partials& partials, dim3 grid,
                       cudaStream_t stream) {
  constexpr int kBytes = Tile<kDim>::kSharedBytes;
  const auto kernel = decode_mma_kernel<T, kDim, kWarps, kStages<kDim>, tile_keys(kDim)>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) {
    return error;
  }
  kernel<<<grid, 32 * kWarps, kBytes, stream>>>(p, partials);
  return cudaGetLastError();
}

/// Blocks that merge at once, about: the machine's size matters little.
constexpr int kMergersAtOnce = 512;

template <typename T>
cudaError_t launch_splits(const DecodeParams& p, const Partials& partials, dim3 grid,
                          cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (shares_loads(p)) {
      if (p.dim == 64) return launch_mma<T, 64>(p, partials, grid, stream);
      if (p.dim == 128) return launch_mma<T, 128>(p, partials, grid, stream);
      return launch_mma<T, 256>(p, partials, grid, stream);
    }
  }
  decode_simt_kernel<T><<<grid, 32 * kSimtWarps, 0, stream>>>(p, partials);
  return cudaGetLastError();
}

}  // namespace

bool has_short_rows(const DecodeParams& p) {
  constexpr int64_t kMostKeys = 1 << 30;            // with room for tiles ahead
  constexpr int64_t kMostElements = (1 << 30) - 1;  // of two bytes
  for (const HeadsView* view : {&p.k, &p.v, &p.k_local, &p.v_local}) {
    if (std::abs(view->row_stride) > kMostElements) return false;
  }
  return p.length <= kMostKeys && p.slots <= kMostKeys && p.capacity * p.block_size <= kMostKeys;
}

bool shares_loads(const DecodeParams& p) {
  constexpr int64_t kSize = 2;
  if (p.type == ElementType::kFloat32 || !has_short_rows(p)) return false;
  for (const HeadsView& view : {p.q, p.k, p.v, p.k_local, p.v_local}) {
    if (!rows_are_aligned(view, kSize)) return false;
  }
  return (p.dim == 64 && tile_fits<64>()) || (p.dim == 128 && tile_fits<128>()) ||
         (p.dim == 256 && tile_fits<256>());
}

int decode_splits(const DecodeParams& params, int sm_count) {
  const int64_t tile = tile_keys(params.dim) * kWarps;
  int64_t most = 0, all = 0;
  bool listed = false;
  for (int i = 0; i < params.sets_count; ++i) {
    const int64_t keys = most_keys(params, params.sets[i]);
    most = std::max(most, keys);
    all += keys;
    listed |= params.sets[i].keys == DecodeKeys::kListed;
  }
  const auto mostly = [](int64_t part, int64_t whole) { return 10 * part >= 7 * whole; };
  const int64_t tiles = divide_up(most, tile);
  // So many parts that all of them have a multiprocessor, rounded down: one block too many would
  // double the time. Where some sets are much shorter, whose parts end early, the longest sets'
  // parts take as much of the machine as their share of the keys. Lists may be of any length, so
  // that sets beside them count as alike.
  const bool alike = listed || mostly(all, params.sets_count * most);
  const int64_t work =
      std::max<int64_t>(1, params.batch * (alike ? params.sets_count * most : all));
  const int64_t one = sm_count * most / work, two = 2 * sm_count * most / work;
  // One block on a multiprocessor leaves half as much to merge as two, and is as quick up to a few
  // tiles, up to some where blocks are on most multiprocessors (measured on H200), or up to many,
  // or where nothing is left to merge, as long as the blocks are about equal and on most
  // multiprocessors (measured on H100), and rows are long: four warps are too few for many short
  // ones (measured on H200).
  constexpr int64_t kFewTilesOfOne = 8, kTilesOfOne = 24, kManyTilesOfOne = 64;
  const bool fills = mostly(one * work, sm_count * most);
  const bool equal = alike && params.dim > 64 && params.slots_count == params.heads &&
                     !params.start_ptr && mostly(one * params.batch * all, sm_count * most);
  const int64_t tiles_of_one = equal ? kManyTilesOfOne : fills ? kTilesOfOne : kFewTilesOfOne;
  const bool suffices = tiles <= tiles_of_one * one || (equal && one == 1);
  const int64_t wanted = suffices && shares_loads(params) ? one : two;
  const int64_t splits = std::max<int64_t>(1, std::min({wanted, tiles, kMostSplits}));
  // To merge takes longer than two more tiles.
  constexpr int64_t kFewTiles = 2;
  const int64_t spared = tiles - divide_up(tiles, splits);
  return spared <= kFewTiles && params.slots_count == params.heads ? 1 : static_cast<int>(splits);
}

size_t decode_workspace(const DecodeParams& params) {
  if (params.has_whole_heads()) return 0;
  return stats_bytes(params) +
         params.batch * params.splits * params.slots_count * params.dim * sizeof(float);
}

cudaError_t launch_decode(const DecodeParams& params, void* workspace, cudaStream_t stream) {
  constexpr int64_t kMaxGridZ = 65535;
  const int64_t total = params.batch;
  Partials all{};
  if (!params.has_whole_heads()) {
    char* base = static_cast<char*>(workspace);
    all = {reinterpret_cast<float*>(base + stats_bytes(params)), reinterpret_cast<float2*>(base)};
  }
  for (int64_t first = 0; first < total; first += kMaxGridZ) {
    DecodeParams p = params;
    p.batch = std::min(kMaxGridZ, total - first);
    const auto skip = [&](HeadsView& view, int64_t size) {
      view.ptr = static_cast<char*>(view.ptr) + first * view.batch_stride * size;
    };
    const int64_t size = params.type == ElementType::kFloat32 ? 4 : 2;
    for (HeadsView* view : {&p.q, &p.k, &p.v, &p.out}) skip(*view, size);
    if (p.k_local.ptr) skip(p.k_local, size);
    if (p.v_local.ptr) skip(p.v_local, size);
    p.lse_ptr += first * p.heads;
    if (p.start_ptr) p.start_ptr += first;
    if (p.indices_ptr) p.indices_ptr += first * p.lists * p.capacity;
    if (p.counts_ptr) p.counts_ptr += first * p.lists;
    const int64_t slot = first * p.splits * p.slots_count;
    const Partials partials{all.sums + slot * p.dim, all.stats + slot};
    const dim3 grid(p.splits, p.sets_count, static_cast<unsigned>(p.batch));
    const cudaError_t error = dispatch_element(p.type, [&](auto element) {
      using T = decltype(element);
      const cudaError_t launched = launch_splits<T>(p, partials, grid, stream);
      if (launched != cudaSuccess || p.has_whole_heads()) return launched;
      const int64_t items = p.batch * p.heads * divide_up(p.dim, kMergeColumns);
      const bool alone = merges_alone(items, kMergersAtOnce, 2 * p.splits);
      const dim3 mergers(static_cast<unsigned>(alone ? divide_up(items, kMergeWarps) : items));
      return launch_dependent(merge_kernel<T>, mergers, kMergeThreads, stream, p, partials, alone);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rtpurbo::cuda
