#include "csrc/ops/quantize_index.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/quantize_index.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor>;

Result quantize_index_cpu(const at::Tensor& k_index, int64_t bits) {
  constexpr const char* kOp = "quantize_index";
  check_floating(kOp, "k_index", k_index);
  check_tensor(kOp, "k_index", k_index, "[B, Rk, N, r]", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t keys = k_index.size(2);
  const int64_t dim = k_index.size(3);
  TORCH_CHECK_VALUE(keys % kIndexBlock == 0, "rtpurbo::quantize_index: k_index must have N a ",
                    "multiple of ", kIndexBlock, ", got ", keys);
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "rtpurbo::quantize_index: bits must be 4 or 8, got ",
                    bits);
  const at::Tensor codes =
      at::empty({k_index.size(0), k_index.size(1), keys, code_bytes(dim, bits)},
                k_index.options().dtype(at::kByte));
  const at::Tensor ranges =
      at::empty({k_index.size(0), k_index.size(1), keys / kIndexBlock, 2 * dim},
                k_index.options().dtype(at::kHalf));
  cpu::quantize_index_kernel({.dtype = k_index.scalar_type(),
                              .k_index = heads_view(k_index),
                              .codes_ptr = codes.mutable_data_ptr<uint8_t>(),
                              .ranges_ptr = ranges.mutable_data_ptr<at::Half>(),
                              .batch = k_index.size(0),
                              .heads = k_index.size(1),
                              .keys = keys,
                              .dim = dim,
                              .bits = bits});
  return {codes, ranges};
}

}  // namespace

Result quantize_index(const at::Tensor& k_index, int64_t bits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::quantize_index", "")
                             .typed<decltype(quantize_index)>();
  return op.call(k_index, bits);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def("quantize_index(Tensor k_index, int bits) -> (Tensor codes, Tensor ranges)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("quantize_index", &quantize_index_cpu); }

}  // namespace rtpurbo
