#include "csrc/cuda/sparse_decode/kernel.cuh"

namespace rtpurbo::cuda::sparse {

template Form form_of<__half, 128>(int, Sifting);

}  // namespace rtpurbo::cuda::sparse
