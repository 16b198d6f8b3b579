#pragma once
#include <cstddef>
#include <cstdint>

#include "csrc/cuda/integers.h"

namespace rtpurbo::cuda {

/// Takes a workspace apart, 256 bytes aligned; from a null base it only measures.
struct WorkspaceParts {
  char* base;
  size_t bytes = 0;  // taken so far

  /// Null for no elements.
  template <typename T>
  void take(T*& pointer, int64_t elements) {
    pointer = elements ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes = static_cast<size_t>(round_up(bytes + elements * sizeof(T), 256));
  }
};

}  // namespace rtpurbo::cuda
