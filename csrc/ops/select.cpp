#include "csrc/ops/select.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select.h"
#include "csrc/ops/common/index.h"

namespace rtpurbo {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

Result select_cpu(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
                  double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
                  const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
                  int64_t capacity, bool exact) {
  constexpr const char* kOp = "select";
  TORCH_CHECK_VALUE(p > 0 && p <= 1, "rtpurbo::select: p must be in (0, 1], got ", p);
  TORCH_CHECK_VALUE(min_tokens >= 0, "rtpurbo::select: min_tokens must be >= 0, got ", min_tokens);
  TORCH_CHECK_VALUE(block_size == 1 || block_size == 16 || block_size == 32 || block_size == 64,
                    "rtpurbo::select: block_size must be 1, 16, 32 or 64, got ", block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select: capacity must be >= 0, got ", capacity);
  const IndexArguments arguments(kOp, q_index, k_index, index_map, window, sinks, block_size,
                                 near_lse, offset, start);

  const int64_t room = arguments.room(capacity);
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor indices =
      at::empty({q_index.size(0), q_index.size(1), q_index.size(2), room}, ints);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), q_index.size(2)}, ints);
  const at::Tensor mass =
      at::empty(counts.sizes(), q_index.options().dtype(arguments.params().accum));
  cpu::select_kernel({.index = arguments.params(),
                      .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                      .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                      .mass_ptr = mass.mutable_data_ptr(),
                      .capacity = room,
                      .min_members = (min_tokens + block_size - 1) / block_size,
                      .p = p,
                      .exact = exact});
  return {indices, counts, mass};
}

}  // namespace

Result select(const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
              double p, int64_t window, int64_t sinks, int64_t min_tokens, int64_t block_size,
              const MaybeTensor& near_lse, const MaybeTensor& offset, const MaybeTensor& start,
              int64_t capacity, bool exact) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::select", "")
                             .typed<decltype(select)>();
  return op.call(q_index, k_index, index_map, p, window, sinks, min_tokens, block_size, near_lse,
                 offset, start, capacity, exact);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "select(Tensor q_index, Tensor k_index, int[] index_map, float p, int window, int sinks,"
      " int min_tokens, int block_size=1, Tensor? near_lse=None, Tensor? offset=None,"
      " Tensor? start=None, int capacity=0, bool exact=True)"
      " -> (Tensor indices, Tensor counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("select", &select_cpu); }

}  // namespace rtpurbo
