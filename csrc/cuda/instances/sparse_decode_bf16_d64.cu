#include "csrc/cuda/sparse_decode/kernel.cuh"

namespace rtpurbo::cuda::sparse {

template Form form_of<__nv_bfloat16, 64>(int, Sifting);

}  // namespace rtpurbo::cuda::sparse
