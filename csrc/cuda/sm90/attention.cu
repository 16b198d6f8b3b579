#include <algorithm>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/sm90/attention.h"
#include "csrc/cuda/sm90/attention_maps.h"
#include "csrc/cuda/sm90/tensor_map.h"

namespace rtpurbo::cuda::sm90 {

// Each is instantiated in a file of its own, in instances/.
template <typename T, int kDim>
cudaError_t launch_attention(const AttentionParams& params, const AttentionMaps& maps, int blocks,
                             cudaStream_t stream);

namespace {

constexpr int64_t kMaxItems = int64_t{1} << 31;
constexpr int64_t kTileRows = 128;
constexpr int64_t kBlockKeys = 64;

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
  const bool blocks = params.block_size == kBlockKeys ||
                      (params.block_size >= params.keys && params.keys <= kBlockKeys);
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
  const auto encode = [&](CUtensorMap& map, const HeadsView& view, int64_t view_heads,
                          int64_t rows) {
    return view_heads == 0 || !view.ptr ||
           encode_tensor_map(map, view, {params.batch, view_heads, rows, params.dim}, params.type);
  };
  return encode(maps.q, params.q, heads, params.rows) &&
         encode(maps.k, params.k, kv_heads, params.keys) &&
         encode(maps.v, params.v, kv_heads, params.keys) &&
         encode(maps.k_local, params.k_local, local_heads, params.local_keys) &&
         encode(maps.v_local, params.v_local, local_heads, params.local_keys);
}

}  // namespace

bool takes_attention(const AttentionParams& params) {
  const int64_t tiles = (params.rows + kTileRows - 1) / kTileRows;
  const int64_t items = params.batch * (params.heads.retrieval + params.heads.near) * tiles;
  return params.type != ElementType::kFloat32 && params.dim <= kMaxHeadDim && params.ticket_ptr &&
         rows_are_aligned(params) && rows_are_aligned(params.out, 2) && items < kMaxItems &&
         takes_lists(params) && is_sm90();
}

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream) {
  AttentionMaps maps;
  if (!encode_maps(maps, params)) return cudaErrorNotSupported;
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  return dispatch_element(params.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      return cudaErrorNotSupported;
    } else {
      if (params.dim <= 64) return launch_attention<T, 64>(params, maps, blocks, stream);
      if (params.dim <= 128) return launch_attention<T, 128>(params, maps, blocks, stream);
      return launch_attention<T, 256>(params, maps, blocks, stream);
    }
  });
}

}  // namespace rtpurbo::cuda::sm90
