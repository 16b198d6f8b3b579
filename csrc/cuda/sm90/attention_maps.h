#pragma once
#include <cuda.h>

namespace rtpurbo::cuda::sm90 {

struct AttentionMaps {
  CUtensorMap q, k, v;
  CUtensorMap k_local, v_local;  // unset when no head reads them
};

}  // namespace rtpurbo::cuda::sm90
