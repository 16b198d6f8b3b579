#include "csrc/ops/select.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select.h"
#include "csrc/ops/common/index.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/select_cuda.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "select";

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result allocate(const at::Tensor& q_index, at::ScalarType mass_type, int64_t room) {
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), q_index.size(2)}, ints);
  return {at::empty({q_index.size(0), q_index.size(1), q_index.size(2), room}, ints), counts,
          at::empty(counts.sizes(), q_index.options().dtype(mass_type))};
}

Result select_cpu(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                  double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
                  const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
                  int64_t capacity, bool exact, const MaybeTensor& codes, const MaybeTensor& ranges,
                  bool refine) {
  check_selection(kOp, p, min_tokens, block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select: capacity must be >= 0, got ", capacity);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges, refine});
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
                   const MaybeTensor& ranges, bool refine) {
  check_selection(kOp, p, min_tokens, block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select: capacity must be >= 0, got ", capacity);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start, {codes, ranges, refine});
  const cpu::IndexParams& in = arguments.params();
  const int64_t room = arguments.room(capacity);
  const Result result = allocate(q_index, at::kFloat, room);
  const auto& [indices, counts, mass] = result;
  if (counts.numel() == 0) return result;
  cuda::SelectParams params = cuda::select_params(kOp, in);
  params.indices_ptr = indices.mutable_data_ptr<int32_t>();
  params.counts_ptr = counts.mutable_data_ptr<int32_t>();
  params.mass_ptr = mass.mutable_data_ptr<float>();
  params.capacity = room;
  params.min_members = min_members(min_tokens, block_size);
  params.p = p;
  params.whole_bins = !exact;
  cuda::run_select(kOp, params, q_index);
  return result;
}
#endif

}  // namespace

Result select(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
              double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
              const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
              int64_t capacity, bool exact, const MaybeTensor& codes, const MaybeTensor& ranges,
              bool refine) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::select", "")
                             .typed<decltype(select)>();
  return op.call(q_index, k_index, index_map, p, window, sinks, min_tokens, block_size, near_lse,
                 offset, start, capacity, exact, codes, ranges, refine);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "select(Tensor q_index, Tensor k_index, int[] index_map, float p, int window, int sinks,"
      " int min_tokens, int block_size=1, Tensor? near_lse=None, Tensor? offset=None,"
      " Tensor? start=None, int capacity=0, bool exact=True, Tensor? codes=None,"
      " Tensor? ranges=None, bool refine=False)"
      " -> (Tensor indices, Tensor counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("select", &select_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("select", &select_cuda); }
#endif

}  // namespace rtpurbo
