#include "csrc/ops/decode.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/decode.h"
#include "csrc/ops/common/decode_arguments.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/decode.h"
#include "csrc/cuda/few_keys.h"
#include "csrc/ops/common/cuda_check.h"
#include "csrc/ops/common/decode_cuda.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "decode";

using Result = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result decode_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window,
                  int64_t sinks, double scale, const MaybeTensor& indices,
                  const MaybeTensor& counts, int64_t block_size, const MaybeTensor& k_local,
                  const MaybeTensor& v_local, const MaybeTensor& start, int64_t length) {
  const DecodeArguments arguments(kOp, indices.has_value(), q, k, v, retrieval_heads, window,
                                  near_window, sinks, scale, indices, counts, block_size, k_local,
                                  v_local, start, length);
  cpu::decode_kernel(arguments.params());
  return arguments.result();
}

#ifdef RTPURBO_WITH_CUDA
Result decode_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window,
                   int64_t sinks, double scale, const MaybeTensor& indices,
                   const MaybeTensor& counts, int64_t block_size, const MaybeTensor& k_local,
                   const MaybeTensor& v_local, const MaybeTensor& start, int64_t length) {
  const DecodeArguments arguments(kOp, indices.has_value(), q, k, v, retrieval_heads, window,
                                  near_window, sinks, scale, indices, counts, block_size, k_local,
                                  v_local, start, length);
  const c10::cuda::CUDAGuard guard(q.device());
  cuda::DecodeParams params = cuda::decode_params(kOp, arguments.params());
  if (q.size(0) == 0) return arguments.result();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  cuda::FewKeysStep few;
  if (cuda::plan_few_keys(params, cuda::multiprocessors(), few)) {
    RTPURBO_CUDA_CHECK(kOp, cuda::launch_few_keys(few, stream));
    return arguments.result();
  }
  params.splits = cuda::decode_splits(params, cuda::multiprocessors());
  const at::Tensor workspace = at::empty({static_cast<int64_t>(cuda::decode_workspace(params))},
                                         q.options().dtype(at::kByte));
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_decode(params, workspace.mutable_data_ptr(), stream));
  return arguments.result();
}
#endif

}  // namespace

Result decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window, int64_t sinks,
              double scale, const MaybeTensor& indices, const MaybeTensor& counts,
              int64_t block_size, const MaybeTensor& k_local, const MaybeTensor& v_local,
              const MaybeTensor& start, int64_t length) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::decode", "")
                             .typed<decltype(decode)>();
  return op.call(q, k, v, retrieval_heads, window, near_window, sinks, scale, indices, counts,
                 block_size, k_local, v_local, start, length);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, int[] retrieval_heads, int window, int near_window,"
      " int sinks, float scale, Tensor? indices=None, Tensor? counts=None, int block_size=1,"
      " Tensor? k_local=None, Tensor? v_local=None, Tensor? start=None, int length=-1)"
      " -> (Tensor out, Tensor lse)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("decode", &decode_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("decode", &decode_cuda); }
#endif

}  // namespace rtpurbo
