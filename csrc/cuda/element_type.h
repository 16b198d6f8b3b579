#pragma once

namespace rtpurbo::cuda {

/// Element types that the CUDA kernels are instantiated for.
enum class ElementType { kFloat32, kBFloat16, kFloat16 };

}  // namespace rtpurbo::cuda
