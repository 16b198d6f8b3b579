#pragma once
#include "csrc/cpu/capability.h"
#include "csrc/cpu/index_params.h"

namespace rtpurbo::cpu {

struct SelectParams {
  IndexParams index;
  int32_t* indices_ptr;  // [B, heads, rows, capacity]
  int32_t* counts_ptr;   // [B, heads, rows]
  void* mass_ptr;        // [B, heads, rows] of accum
  int64_t capacity, min_members;
  double p;
  bool exact;
};

RTPURBO_DECLARE_CPU_KERNEL(select_kernel, SelectParams)

}  // namespace rtpurbo::cpu
