#pragma once
// Quantised index keys; free of torch.

#include <cstdint>

namespace rtpurbo {

/// Keys that share a minimum and a step.
inline constexpr int64_t kIndexBlock = 64;

/// Bytes of a key's codes. With 4 bits, byte d holds dimension d below dimension d + ceil(dim / 2).
constexpr int64_t code_bytes(int64_t dim, int64_t bits) { return bits == 4 ? (dim + 1) / 2 : dim; }

}  // namespace rtpurbo
