#include "csrc/ops/select.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/select.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
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
  check_index(kOp, q_index, k_index, index_map);
  TORCH_CHECK_VALUE(k_index.size(2) >= q_index.size(2),
                    "rtpurbo::select: k_index must hold at least the keys of the ", q_index.size(2),
                    " query rows, got N = ", k_index.size(2));
  TORCH_CHECK_VALUE(p > 0 && p <= 1, "rtpurbo::select: p must be in (0, 1], got ", p);
  check_mask(kOp, window, sinks, 1.0);
  TORCH_CHECK_VALUE(min_tokens >= 0, "rtpurbo::select: min_tokens must be >= 0, got ", min_tokens);
  TORCH_CHECK_VALUE(block_size == 1 || block_size == 16 || block_size == 32 || block_size == 64,
                    "rtpurbo::select: block_size must be 1, 16, 32 or 64, got ", block_size);
  TORCH_CHECK_VALUE(capacity >= 0, "rtpurbo::select: capacity must be >= 0, got ", capacity);
  check_start(kOp, start, q_index.size(0), q_index);
  const at::ScalarType accum = accumulation_type(q_index, k_index);
  const at::Tensor near = per_row(kOp, near_lse, q_index, accum);
  const at::Tensor offsets = per_head(kOp, "offset", offset, q_index, accum);

  const int64_t keys = k_index.size(2);
  const int64_t room = capacity > 0 ? capacity : (keys + block_size - 1) / block_size;
  const auto ints = q_index.options().dtype(at::kInt);
  const at::Tensor indices =
      at::empty({q_index.size(0), q_index.size(1), q_index.size(2), room}, ints);
  const at::Tensor counts = at::empty({q_index.size(0), q_index.size(1), q_index.size(2)}, ints);
  const at::Tensor mass = at::empty(counts.sizes(), q_index.options().dtype(accum));
  at::Tensor start_kept;
  cpu::select_kernel({.q_dtype = q_index.scalar_type(),
                      .k_dtype = k_index.scalar_type(),
                      .accum = accum,
                      .q_index = heads_view(q_index),
                      .k_index = heads_view(k_index),
                      .index_map = index_map.data(),
                      .near_lse_ptr = data_or_null(near),
                      .offset_ptr = data_or_null(offsets),
                      .start_ptr = start_ptr(start, start_kept),
                      .indices_ptr = indices.mutable_data_ptr<int32_t>(),
                      .counts_ptr = counts.mutable_data_ptr<int32_t>(),
                      .mass_ptr = mass.mutable_data_ptr(),
                      .batch = q_index.size(0),
                      .heads = q_index.size(1),
                      .key_heads = k_index.size(1),
                      .rows = q_index.size(2),
                      .keys = keys,
                      .dim = q_index.size(3),
                      .capacity = room,
                      .window = std::min(window, keys),
                      .sinks = std::min(sinks, keys),
                      .min_members = (min_tokens + block_size - 1) / block_size,
                      .block_size = block_size,
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
