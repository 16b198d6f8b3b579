#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "csrc/cpu/capability.h"

namespace rtpurbo::cpu {

struct TopPParams {
  c10::ScalarType dtype;       // of scores
  const void* scores_ptr;      // [rows, n], rows scores_row_stride elements apart
  const void* forced_lse_ptr;  // [rows] float (double for double scores), or null
  int32_t* indices_ptr;        // [rows, n]
  int32_t* counts_ptr;         // [rows]
  void* mass_ptr;              // [rows] float (double for double scores)
  int64_t rows;
  int64_t n;
  int64_t scores_row_stride;
  int64_t min_members;
  double p;
  bool exact;
};

RTPURBO_DECLARE_CPU_KERNEL(top_p_kernel, TopPParams)

}  // namespace rtpurbo::cpu
