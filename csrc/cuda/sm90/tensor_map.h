#pragma once
// How the copy engine of sm_90 reads and writes [B, H, S, D] tensors: boxes of 64 columns, of which
// shared memory has rows of 128 bytes with the 128-byte swizzle.

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"
#include "csrc/ops/common/heads_view.h"

namespace rtpurbo::cuda::sm90 {

inline constexpr int kBoxRows = 64;
inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxBytes = kBoxRows * kBoxColumns * 2;

struct TensorExtents {
  int64_t batch, heads, rows, dim;
};

/// The driver's function, found at run time: the library must load where there is no driver. Null
/// where it has none.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder();

/// Encodes the map of a 16-bit tensor by boxes of so many rows; false when the driver cannot
/// describe it.
bool encode_tensor_map(CUtensorMap& map, const HeadsView& view, const TensorExtents& extents,
                       ElementType type, int box_rows = kBoxRows);

}  // namespace rtpurbo::cuda::sm90
