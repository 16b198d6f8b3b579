#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "csrc/cpu/attention.h"
#include "csrc/cpu/capability.h"

namespace rtpurbo::cpu {

struct DecodeParams {
  c10::ScalarType dtype;
  HeadsView q;                 // one row a head
  HeadsView k, v;              // position = row
  HeadsView k_local, v_local;  // rings: the first min(length - start, slots) rows, in any order
  HeadsView out;
  void* lse_ptr;               // [B, Hq] float (double for double q)
  const int64_t* start_ptr;    // [B] or null
  const int32_t* indices_ptr;  // [B, lists, capacity] contiguous
  const int32_t* counts_ptr;   // [B, lists]
  int64_t batch, heads, length, slots, dim;
  int64_t lists, capacity, block_size;
  int64_t window, near_window, sinks;
  double scale;
  const std::vector<HeadSet>* head_sets;
};

RTPURBO_DECLARE_CPU_KERNEL(decode_kernel, DecodeParams)

}  // namespace rtpurbo::cpu
