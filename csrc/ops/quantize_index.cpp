#include "csrc/ops/quantize_index.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/quantize_index.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/index_block.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/quantize_index.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "quantize_index";

using Result = std::tuple<at::Tensor, at::Tensor>;

/// Checks the arguments, and returns codes and ranges to be filled.
Result check_and_allocate(const at::Tensor& k_index, int64_t bits) {
  check_floating(kOp, "k_index", k_index);
  check_tensor(kOp, "k_index", k_index, "[B, Rk, N, r]", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t keys = k_index.size(2);
  const int64_t dim = k_index.size(3);
  TORCH_CHECK_VALUE(keys % kIndexBlock == 0, "rtpurbo::quantize_index: k_index must have N a ",
                    "multiple of ", kIndexBlock, ", got ", keys);
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "rtpurbo::quantize_index: bits must be 4 or 8, got ",
                    bits);
  return {at::empty({k_index.size(0), k_index.size(1), keys, code_bytes(dim, bits)},
                    k_index.options().dtype(at::kByte)),
          at::empty({k_index.size(0), k_index.size(1), keys / kIndexBlock, 2 * dim},
                    k_index.options().dtype(at::kHalf))};
}

Result quantize_index_cpu(const at::Tensor& k_index, int64_t bits) {
  const Result result = check_and_allocate(k_index, bits);
  const auto& [codes, ranges] = result;
  cpu::quantize_index_kernel({.dtype = k_index.scalar_type(),
                              .k_index = heads_view(k_index),
                              .codes_ptr = codes.mutable_data_ptr<uint8_t>(),
                              .ranges_ptr = ranges.mutable_data_ptr<at::Half>(),
                              .batch = k_index.size(0),
                              .heads = k_index.size(1),
                              .keys = k_index.size(2),
                              .dim = k_index.size(3),
                              .bits = bits});
  return result;
}

#ifdef RTPURBO_WITH_CUDA
Result quantize_index_cuda(const at::Tensor& k_index, int64_t bits) {
  const Result result = check_and_allocate(k_index, bits);
  cuda::check_not_double(kOp, "k_index", k_index.scalar_type());
  const auto& [codes, ranges] = result;
  const c10::cuda::CUDAGuard guard(k_index.device());
  RTPURBO_CUDA_CHECK(kOp,
                     cuda::launch_quantize_index({.type = cuda::element_type(k_index.scalar_type()),
                                                  .k_index = heads_view(k_index),
                                                  .codes_ptr = codes.mutable_data_ptr<uint8_t>(),
                                                  .ranges_ptr = ranges.mutable_data_ptr(),
                                                  .batch = k_index.size(0),
                                                  .heads = k_index.size(1),
                                                  .keys = k_index.size(2),
                                                  .dim = k_index.size(3),
                                                  .bits = bits},
                                                 c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

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
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("quantize_index", &quantize_index_cuda); }
#endif

}  // namespace rtpurbo
