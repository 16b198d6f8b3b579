#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace rtpurbo {

/// Index keys in 4 or 8 bits, with a minimum and a step for each block of 64 keys and dimension:
/// k_index ~ minimum + step * code, off by at most step / 2.
///
/// k_index [B, Rk, N, r], N a multiple of 64; float32, float64, bfloat16 or float16
/// bits    4 or 8
/// returns codes uint8 [B, Rk, N, c]. With 8 bits c = r. With 4 bits c = ceil(r / 2), and byte d
///         holds dimension d in its lower and d + c in its upper half.
///         ranges float16 [B, Rk, N / 64, 2 r], the minima (rounded down) and then the steps
///         (rounded up). Where one of them is no finite float16, for a NaN or an infinity, the
///         minimum is NaN.
std::tuple<at::Tensor, at::Tensor> quantize_index(const at::Tensor& k_index, int64_t bits);

}  // namespace rtpurbo
