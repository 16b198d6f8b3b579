#pragma once
// Stage 1 of select_tiles for rank "max" by the asynchronous tensor cores of sm_90.

#include <cuda_runtime_api.h>

#include "csrc/cuda/select_tiles/problem.cuh"

namespace rtpurbo::cuda::sm90 {

/// Blocks of 64 keys that a thread block scores.
inline constexpr int64_t kMaximaChunk = 256;

/// Whether the current device and, beyond those of the portable tensor-core path, these parameters
/// suit: rank "max", tiles of 128 rows.
bool takes_tile_maxima(const SelectTilesParams& params);

/// Largest q . k of each row and block in fp16, and the chunks' sums of far masses.
cudaError_t launch_tile_maxima(const SelectTilesParams& params, const tiles::Workspace& workspace,
                               cudaStream_t stream);

}  // namespace rtpurbo::cuda::sm90
