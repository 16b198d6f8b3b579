#include <cuda_runtime_api.h>

#include "csrc/cuda/sm90/tensor_map.h"

namespace rtpurbo::cuda::sm90 {

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    const bool valid = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(valid ? entry : nullptr);
  }();
  return function;
}

bool encode_tensor_map(CUtensorMap& map, const HeadsView& view, const TensorExtents& extents,
                       ElementType type, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (!encode) return false;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride) * 2; };
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(extents.dim), static_cast<cuuint64_t>(extents.rows),
      static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t strides[] = {bytes(view.row_stride), bytes(view.head_stride),
                                bytes(view.batch_stride)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  return encode(&map,
                type == ElementType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                4, view.ptr, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace rtpurbo::cuda::sm90
