#pragma once
#include <cstdlib>
#include <cstring>

namespace rtpurbo::cuda {

/// Whether the environment asks for the kernels that every device runs.
inline bool prefers_portable() {
  const char* value = std::getenv("RTPURBO_PORTABLE");
  return value && std::strcmp(value, "1") == 0;
}

}  // namespace rtpurbo::cuda
