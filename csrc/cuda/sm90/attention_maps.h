#pragma once
#include <cuda.h>

namespace rtpurbo::cuda::sm90 {

inline constexpr int kWarpRows = 16;  // of a tile, that one warp computes

struct AttentionMaps {
  CUtensorMap q, k, v;
  CUtensorMap k_local, v_local;  // unset when no head reads them
  CUtensorMap out;               // by boxes of the rows of a warp; unset without values
};

}  // namespace rtpurbo::cuda::sm90
