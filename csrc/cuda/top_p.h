#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/cuda/element_type.h"

namespace rtpurbo::cuda {

struct TopPParams {
  ElementType scores_type;
  const void* scores_ptr;       // [rows, n], rows scores_row_stride elements apart
  const float* forced_lse_ptr;  // [rows], or null
  int32_t* indices_ptr;         // [rows, n]
  int32_t* counts_ptr;          // [rows]
  float* mass_ptr;              // [rows]
  int64_t rows;
  int64_t n;
  int64_t scores_row_stride;
  int64_t min_members;
  double p;
};

/// Exact top-p, one block a row; bit-deterministic (masses are summed as integers).
cudaError_t launch_top_p(const TopPParams& params, cudaStream_t stream);

}  // namespace rtpurbo::cuda
