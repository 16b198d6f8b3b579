#pragma once
#include <cuda.h>

#include "csrc/cuda/select_tiles.h"

namespace rtpurbo::cuda::sm90::maxima {

/// Describes the whole blocks of the index keys [B, key_heads, keys, 16] to the copy engine, as
/// [B, key_heads, 64, blocks, 16] in boxes of two blocks: of these the keys come in turns, so that
/// neighbouring scores belong to different blocks. False when the driver cannot.
bool encode_key_map(CUtensorMap& map, const SelectTilesParams& params);

}  // namespace rtpurbo::cuda::sm90::maxima
