#include <cuda_runtime_api.h>

#include <algorithm>

#include "csrc/cuda/sm90/tensor_map.h"
#include "csrc/cuda/sm90/tile_maxima/key_map.h"
#include "csrc/cuda/sm90/tile_maxima/work.cuh"

namespace rtpurbo::cuda::sm90::maxima {

bool encode_key_map(CUtensorMap& map, const SelectTilesParams& p) {
  const auto encode = tensor_map_encoder();
  const int64_t blocks = p.keys / tiles::kBlock;
  if (!encode || blocks == 0) return false;
  const int16_t* heads = p.index_map.heads;
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t sizes[] = {size(tiles::kDim), size(blocks), size(tiles::kBlock),
                              size(*std::max_element(heads, heads + p.heads) + 1), size(p.batch)};
  const HeadsView& k = p.k_index;
  const cuuint64_t strides[] = {size(2 * tiles::kBlock * k.row_stride), size(2 * k.row_stride),
                                size(2 * k.head_stride), size(2 * k.batch_stride)};
  const cuuint32_t box[] = {tiles::kDim, kBoxBlocks, tiles::kBlock, 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, k.ptr, sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace rtpurbo::cuda::sm90::maxima
