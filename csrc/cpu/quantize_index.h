#pragma once
#include <c10/util/Half.h>

#include "csrc/cpu/attention.h"

namespace rtpurbo::cpu {

struct QuantizeIndexParams {
  c10::ScalarType dtype;
  HeadsView k_index;      // [B, heads, keys, dim]
  uint8_t* codes_ptr;     // [B, heads, keys, code bytes]
  c10::Half* ranges_ptr;  // [B, heads, keys / kIndexBlock, 2 dim]
  int64_t batch, heads, keys, dim, bits;
};

RTPURBO_DECLARE_CPU_KERNEL(quantize_index_kernel, QuantizeIndexParams)

}  // namespace rtpurbo::cpu
