#include <algorithm>
#include <cmath>
#include <type_traits>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/sm90/attention.h"
#include "csrc/cuda/sm90/attention_maps.h"
#include "csrc/cuda/sm90/attention_parts.cuh"
#include "csrc/cuda/sm90/tensor_map.h"
#include "csrc/cuda/sm90/work_queue.h"

namespace rtpurbo::cuda::sm90 {

// Each is instantiated in a file of its own, in instances/.
template <typename T, int kDim>
cudaError_t launch_attention(const AttentionParams& params, const AttentionMaps& maps,
                             const WorkQueue& queue, int blocks, cudaStream_t stream);

namespace {

constexpr int64_t kMaxItems = int64_t{1} << 31;

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}

bool is_sm90() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

/// Tiles and blocks of lists must be those of the kernel, or so large that there is only one.
bool takes_lists(const AttentionParams& params) {
  if (!params.block_indices_ptr) return true;
  const bool tiles =
      params.tile == kTileRows || (params.tile >= params.rows && params.rows <= kTileRows);
  const bool blocks = params.block_size == kBoxRows ||
                      (params.block_size >= params.keys && params.keys <= kBoxRows);
  return tiles && blocks;
}

bool encode_maps(AttentionMaps& maps, const AttentionParams& params) {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t local_heads = 0;
  for (int i = 0; i < params.heads.retrieval + params.heads.near; ++i) {
    const HeadJob& job = params.heads.jobs[i];
    int64_t& read = job.from_local ? local_heads : kv_heads;
    read = std::max<int64_t>(read, job.kv_head + 1);
    heads = std::max<int64_t>(heads, job.head + 1);
  }
  const auto encode = [&](CUtensorMap& map, const HeadsView& view, int64_t view_heads, int64_t rows,
                          int box_rows = kBoxRows) {
    return view_heads == 0 || !view.ptr ||
           encode_tensor_map(map, view, {params.batch, view_heads, rows, params.dim}, params.type,
                             box_rows);
  };
  return encode(maps.q, params.q, heads, params.rows) &&
         encode(maps.k, params.k, kv_heads, params.keys) &&
         encode(maps.v, params.v, kv_heads, params.keys) &&
         encode(maps.k_local, params.k_local, local_heads, params.local_keys) &&
         encode(maps.v_local, params.v_local, local_heads, params.local_keys) &&
         encode(maps.out, params.out, heads, params.rows, kWarpRows);
}

int64_t tiles_of(const AttentionParams& params) {
  return (int64_t{params.rows} + kTileRows - 1) / kTileRows;
}

/// How many of a role's heads run together, so that the keys and values that they read at a time
/// stay in L2. The heads of a kv head are adjacent.
uint32_t heads_of_section(const AttentionParams& params, const HeadJob* jobs, int64_t heads) {
  if (heads == 0) return 1;
  int64_t kv_heads = 1;
  for (const HeadJob* job = jobs + 1; job < jobs + heads; ++job) {
    kv_heads += job->kv_head != job[-1].kv_head || job->from_local != job[-1].from_local;
  }
  // Keys that fit. Half of L2, as each half of it keeps copies of what the other holds.
  int64_t room = device_attribute(cudaDevAttrL2CacheSize) / 2 / (int64_t{params.dim} * 4);
  int64_t of_kv_head = params.keys;
  if (jobs->near) {
    // A window for each kv head, and the rows that all blocks work on.
    const int64_t rows = device_attribute(cudaDevAttrMultiProcessorCount) * int64_t{kTileRows};
    of_kv_head = std::min<int64_t>(std::max(params.keys, params.local_keys),
                                   int64_t{params.window} + params.sinks);
    room -= std::min(rows / heads, int64_t{params.rows}) * kv_heads;
  }
  const int64_t fit = std::max<int64_t>(1, room / std::max<int64_t>(1, of_kv_head));
  const int64_t sections = (kv_heads + fit - 1) / fit;
  return static_cast<uint32_t>((heads + sections - 1) / sections);
}

/// Parts of a tile, by role.
struct Split {
  int64_t retrieval = 1, near = 1;
};

/// Splits tiles that would take longer than all work takes when it is spread evenly, into parts
/// that are short against that. Tiles of a chunk, all as long, leave multiprocessors idle sooner
/// than those of a whole prompt, of which the short ones fill up what the long ones leave.
Split split_of(const AttentionParams& params) {
  constexpr double kFewestKeys = 1024, kPartsOfShare = 3.0, kMostParts = 32.0;
  const double keys = std::max(params.keys, params.local_keys);
  const double mean = keys - params.rows / 2.0;  // of a tile's keys
  const double listed =
      params.block_indices_ptr ? static_cast<double>(params.capacity) * params.block_size : keys;
  const double seen = static_cast<double>(params.window) + params.sinks + kTileRows;
  const double all =
      static_cast<double>(params.batch * tiles_of(params)) *
      (params.heads.retrieval * std::min(mean, listed) + params.heads.near * std::min(mean, seen));
  const double share =
      std::max(kFewestKeys, all / std::max(1, device_attribute(cudaDevAttrMultiProcessorCount)));
  const double longest_whole = (2.0 * params.rows < keys ? 0.5 : 1.75) * share;
  const auto parts = [&](double longest) {
    if (longest < longest_whole) return int64_t{1};
    const double wanted = longest / std::max(kFewestKeys, share / kPartsOfShare);
    return static_cast<int64_t>(std::clamp(std::ceil(wanted), 1.0, kMostParts));
  };
  return {.retrieval = parts(std::min(keys, listed)), .near = parts(std::min(keys, seen))};
}

WorkQueue work_queue(const AttentionParams& params, const Split& split) {
  const int64_t tiles = tiles_of(params);
  const auto retrieval = static_cast<uint32_t>(params.heads.retrieval);
  const auto near = static_cast<uint32_t>(params.heads.near);
  const auto retrieval_items =
      static_cast<uint32_t>(params.batch * retrieval * tiles * split.retrieval);
  const auto near_items = static_cast<uint32_t>(params.batch * near * tiles * split.near);
  const HeadJob* jobs = params.heads.jobs;
  return {.retrieval = {0, retrieval, heads_of_section(params, jobs, retrieval),
                        static_cast<uint32_t>(split.retrieval), 0},
          .near = {retrieval, near, heads_of_section(params, jobs + retrieval, near),
                   static_cast<uint32_t>(split.near), split.retrieval > 1 ? retrieval_items : 0},
          .retrieval_items = retrieval_items,
          .items = retrieval_items + near_items,
          .tiles = static_cast<uint32_t>(tiles)};
}

/// Calls fn(dim) with the kernel's head dim as a constant.
template <typename Fn>
auto with_dim(int dim, const Fn& fn) {
  if (dim <= 64) return fn(std::integral_constant<int, 64>());
  if (dim <= 128) return fn(std::integral_constant<int, 128>());
  return fn(std::integral_constant<int, 256>());
}

}  // namespace

bool takes_attention(const AttentionParams& params) {
  const int64_t heads = params.heads.retrieval + params.heads.near;
  const int64_t items = params.batch * heads * tiles_of(params);
  return params.type != ElementType::kFloat32 && params.dim <= kMaxHeadDim && params.ticket_ptr &&
         rows_are_aligned(params) && rows_are_aligned(params.out, 2) && items < kMaxItems &&
         takes_lists(params) && is_sm90();
}

int64_t attention_parts(const AttentionParams& params) {
  const WorkQueue queue = work_queue(params, split_of(params));
  const uint32_t near_items = queue.items - queue.retrieval_items;
  const int64_t parts = int64_t{queue.retrieval.parts > 1 ? queue.retrieval_items : 0} +
                        int64_t{queue.near.parts > 1 ? near_items : 0};
  return parts *
         with_dim(params.dim, [](auto dim) { return Parts<decltype(dim)::value>::kFloats; });
}

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream) {
  AttentionMaps maps;
  if (!encode_maps(maps, params)) return cudaErrorNotSupported;
  const WorkQueue queue = work_queue(params, params.parts_ptr ? split_of(params) : Split{});
  if (queue.items == 0) return cudaSuccess;
  const int blocks = static_cast<int>(std::min<int64_t>(
      queue.items, std::max(1, device_attribute(cudaDevAttrMultiProcessorCount))));
  return dispatch_element(params.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      return cudaErrorNotSupported;
    } else {
      return with_dim(params.dim, [&](auto dim) {
        return launch_attention<T, decltype(dim)::value>(params, maps, queue, blocks, stream);
      });
    }
  });
}

}  // namespace rtpurbo::cuda::sm90
