#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "csrc/cuda/decode.h"
#include "csrc/cuda/select.h"

namespace rtpurbo::cuda {

struct SparseDecodeParams {
  DecodeParams decode;     // list r is chosen by query r of `select`; its lists are not read
  SelectParams select;     // one row a head; its near_lse and indices are not used
  uint64_t* selected_ptr;  // [B, R, words]: bit i of word j is key 64 j + i
  int64_t words;
};

struct SparseDecodePlan {
  SelectPlan select;
  int blocks_of_sm;
  int near_splits;
  size_t workspace_bytes;
};

/// One launch: near keys of all heads and the scan of the index keys, selection, attention to the
/// selected keys, and the merge. Blocks meet at barriers; reruns give the same bits.
/// cudaErrorNotSupported: types, dimensions, alignments or a device that the kernel does not take.
cudaError_t plan_sparse_decode(const SparseDecodeParams& params, int sm_count,
                               SparseDecodePlan& plan);
cudaError_t launch_sparse_decode(const SparseDecodeParams& params, const SparseDecodePlan& plan,
                                 void* workspace, cudaStream_t stream);

}  // namespace rtpurbo::cuda
