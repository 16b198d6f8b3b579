#pragma once
#include <cstdint>

namespace rtpurbo::cuda {

/// Head numbers inside kernel parameters, so that no copy to the device is needed.
struct HeadList {
  static constexpr int kMax = 512;
  int32_t count = 0;
  int16_t heads[kMax];
};

}  // namespace rtpurbo::cuda
