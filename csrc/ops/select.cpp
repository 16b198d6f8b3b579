#include "csrc/ops/select.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select.h"
#include "csrc/ops/common/index.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/select.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "select";

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

void check_selection(double p, int64_t min_tokens, int64_t block_size, int64_t capacity) {
  TORCH_CHECK_VALUE(p > 0 && p <= 1, "rtpurbo::select: p must be in (0, 1], got ", p);
  TORCH_CHECK_VALUE(min_tokens >= 0, "rtpurbo::select: min_tokens must be >= 0, got ", min_tokens);
  TORCH_CHECK_VALUE(block_size == 1 || block_size == 16 || block_size == 32 || block_size == 64,
                    "rtpurbo::select: block_size must be 1, 16, 32 or 64, got ", block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select: capacity must be >= 0, got ", capacity);
}

/// min_tokens in members, rounded up.
int64_t min_members(int64_t min_tokens, int64_t block_size) {
  return min_tokens / block_size + (min_tokens % block_size != 0);
}

Result allocate(const at::Tensor& q_index, at::ScalarType mass_type, int64_t room) {
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), q_index.size(2)}, ints);
  return {at::empty({q_index.size(0), q_index.size(1), q_index.size(2), room}, ints), counts,
          at::empty(counts.sizes(), q_index.options().dtype(mass_type))};
}

Result select_cpu(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                  double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
                  const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
                  int64_t capacity, bool exact, const MaybeTensor& codes,
                  const MaybeTensor& ranges) {
  check_selection(p, min_tokens, block_size, capacity);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges});
  const int64_t room = arguments.room(capacity);
  const Result result = allocate(q_index, arguments.params().accum, room);
  const auto& [indices, counts, mass] = result;
  cpu::select_kernel({.index = arguments.params(),
                      .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                      .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                      .mass_ptr = mass.mutable_data_ptr(),
                      .capacity = room,
                      .min_members = min_members(min_tokens, block_size),
                      .p = p,
                      .exact = exact});
  return result;
}

#ifdef RTPURBO_WITH_CUDA
Result select_cuda(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                   double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
                   const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
                   int64_t capacity, bool exact, const MaybeTensor& codes,
                   const MaybeTensor& ranges) {
  check_selection(p, min_tokens, block_size, capacity);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges});
  TORCH_CHECK_NOT_IMPLEMENTED(!codes,
                              "rtpurbo::select: 4- and 8-bit index keys have no CUDA kernel yet; "
                              "use RTPurboConfig(index_bits=16) or run on the CPU "
                              "(model.to('cpu'))");
  cuda::check_not_double(kOp, "q_index", q_index.scalar_type());
  cuda::check_not_double(kOp, "k_index", k_index.scalar_type());
  TORCH_CHECK_VALUE(q_index.size(3) <= cuda::kMaxIndexDim,
                    "rtpurbo::select: q_index on CUDA must have an index dim r <= ",
                    cuda::kMaxIndexDim, ", got ", q_index.size(3));
  const cpu::IndexParams& in = arguments.params();
  const int64_t room = arguments.room(capacity);
  const Result result = allocate(q_index, at::kFloat, room);
  const auto& [indices, counts, mass] = result;
  if (counts.numel() == 0) return result;
  const c10::cuda::CUDAGuard guard(q_index.device());
  const cuda::SelectParams params{.q_type = cuda::element_type(in.q_dtype),
                                  .k_type = cuda::element_type(in.k_dtype),
                                  .q_index = in.q_index,
                                  .k_index = in.k_index,
                                  .index_map = cuda::head_list(kOp, "index_map", index_map),
                                  .near_lse_ptr = static_cast<const float*>(in.near_lse_ptr),
                                  .offset_ptr = static_cast<const float*>(in.offset_ptr),
                                  .start_ptr = in.start_ptr,
                                  .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                                  .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                                  .mass_ptr = mass.mutable_data_ptr<float>(),
                                  .batch = in.batch,
                                  .heads = in.heads,
                                  .rows = in.rows,
                                  .keys = in.keys,
                                  .dim = in.dim,
                                  .window = in.window,
                                  .sinks = in.sinks,
                                  .block_size = block_size,
                                  .capacity = room,
                                  .min_members = min_members(min_tokens, block_size),
                                  .p = p,
                                  .exact = exact};
  const at::Tensor workspace = at::empty({static_cast<int64_t>(cuda::select_workspace(params))},
                                         q_index.options().dtype(at::kByte));
  RTPURBO_CUDA_CHECK(
      kOp, cuda::launch_select(params, workspace.mutable_data_ptr(), cuda::multiprocessors(),
                               c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

}  // namespace

Result select(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
              double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
              const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
              int64_t capacity, bool exact, const MaybeTensor& codes, const MaybeTensor& ranges) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::select", "")
                             .typed<decltype(select)>();
  return op.call(q_index, k_index, index_map, p, window, sinks, min_tokens, block_size, near_lse,
                 offset, start, capacity, exact, codes, ranges);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "select(Tensor q_index, Tensor k_index, int[] index_map, float p, int window, int sinks,"
      " int min_tokens, int block_size=1, Tensor? near_lse=None, Tensor? offset=None,"
      " Tensor? start=None, int capacity=0, bool exact=True, Tensor? codes=None,"
      " Tensor? ranges=None)"
      " -> (Tensor indices, Tensor counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("select", &select_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("select", &select_cuda); }
#endif

}  // namespace rtpurbo
