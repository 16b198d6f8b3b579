#pragma once
// Quantised index keys of one head, and back to numbers.

#include <c10/util/Half.h>

#include "csrc/cpu/capability.h"
#include "csrc/cpu/index_params.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// The first `count` keys of a head, a multiple of kIndexBlock.
struct CodeRows {
  const uint8_t* codes;
  const c10::Half* ranges;
  int64_t codes_stride, ranges_stride;
  int64_t bits, count;

  const uint8_t* key(int64_t n) const { return codes + n * codes_stride; }
  /// Minima and steps of key n's block.
  const c10::Half* block_ranges(int64_t n) const {
    return ranges + n / kIndexBlock * ranges_stride;
  }
};

inline CodeRows code_rows(const IndexParams& params, int64_t batch, int64_t head) {
  const auto offset = [&](const HeadsView& view) {
    return batch * view.batch_stride + head * view.head_stride;
  };
  return {static_cast<const uint8_t*>(params.codes.ptr) + offset(params.codes),
          static_cast<const c10::Half*>(params.ranges.ptr) + offset(params.ranges),
          params.codes.row_stride,
          params.ranges.row_stride,
          params.code_bits,
          params.coded};
}

/// key[d] = minimum + step * code. The product is exact in float, so that an fma changes nothing.
template <typename Accum>
void dequantize(const uint8_t* codes, int64_t bits, const Accum* ranges, int64_t dim, Accum* key) {
  const Accum* steps = ranges + dim;
  const int64_t bytes = code_bytes(dim, bits);
  const uint8_t mask = bits == 4 ? 15 : 255;
  for (int64_t d = 0; d < bytes; ++d) {
    key[d] = ranges[d] + steps[d] * static_cast<Accum>(codes[d] & mask);
  }
  for (int64_t d = bytes; d < dim; ++d) {
    key[d] = ranges[d] + steps[d] * static_cast<Accum>(codes[d - bytes] >> 4);
  }
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
