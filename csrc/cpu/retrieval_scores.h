#pragma once
#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

struct RetrievalScoresParams {
  c10::ScalarType dtype;     // of q and k
  HeadsView q, k;            // [B, Hq, rows, dim], [B, Hk, keys, dim]
  const int64_t* start_ptr;  // [B] or null
  void* scores_ptr;          // [B, Hq] float (double for double q)
  int64_t batch, query_heads, kv_heads, rows, keys, dim;
  int64_t pre_begin, pre_end;
  double scale;
};

RTPURBO_DECLARE_CPU_KERNEL(retrieval_scores_kernel, RetrievalScoresParams)

}  // namespace rtpurbo::cpu
