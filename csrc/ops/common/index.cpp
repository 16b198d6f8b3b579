#include "csrc/ops/common/index.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/index_block.h"

namespace rtpurbo {
namespace {

/// Checks near_lse [B, R, M], and returns it contiguous as `dtype`; undefined when absent.
at::Tensor per_row(const char* op, const std::optional<at::Tensor>& near_lse,
                   const at::Tensor& q_index, at::ScalarType dtype) {
  if (!near_lse) return {};
  check_floating(op, "near_lse", *near_lse);
  check_tensor(op, "near_lse", *near_lse, "[B, R, M]",
               {q_index.size(0), q_index.size(1), q_index.size(2)});
  check_device(op, "near_lse", *near_lse, "q_index", q_index);
  return near_lse->to(dtype).contiguous();
}

/// Checks the quantised keys of q_index and k_index; returns how many there are.
int64_t check_quantised(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                        const Quantised& quantised) {
  const auto& [codes, ranges, refine] = quantised;
  check_pair(op, "codes", codes, "ranges", ranges);
  TORCH_CHECK_VALUE(codes || !refine, "rtpurbo::", op,
                    ": refine needs codes and ranges of quantize_index, got none; leave it out for "
                    "keys that are not quantised");
  if (!codes) return 0;
  const int64_t dim = k_index.size(3);
  check_dtype(op, "codes", *codes, at::kByte);
  check_tensor(op, "codes", *codes, "[B, Rk, Q, r or ceil(r / 2)]",
               {k_index.size(0), k_index.size(1), kAnySize, kAnySize});
  check_device(op, "codes", *codes, "q_index", q_index);
  const int64_t coded = codes->size(2);
  TORCH_CHECK_VALUE(codes->size(3) == code_bytes(dim, 8) || codes->size(3) == code_bytes(dim, 4),
                    "rtpurbo::", op, ": codes must have r = ", dim, " bytes a key or half of them",
                    ", got ", codes->size(3));
  TORCH_CHECK_VALUE(coded % kIndexBlock == 0, "rtpurbo::", op, ": codes must hold a multiple of ",
                    kIndexBlock, " keys, got ", coded);
  check_dtype(op, "ranges", *ranges, at::kHalf);
  check_tensor(op, "ranges", *ranges, "[B, Rk, Q / 64, 2 r]",
               {k_index.size(0), k_index.size(1), coded / kIndexBlock, 2 * dim});
  check_device(op, "ranges", *ranges, "q_index", q_index);
  if (refine) {
    TORCH_CHECK_VALUE(k_index.size(2) >= coded, "rtpurbo::", op,
                      ": k_index must with refine hold all N keys, the ", coded,
                      " of codes too, got ", k_index.size(2));
    return coded;
  }
  TORCH_CHECK_VALUE(k_index.size(2) + coded <= INT32_MAX, "rtpurbo::", op,
                    ": k_index and codes must have N <= 2^31 - 1 keys, got ",
                    k_index.size(2) + coded);
  return coded;
}

/// The view without its first `count` rows.
HeadsView skip_rows(HeadsView view, int64_t count, int64_t element_size) {
  view.ptr = static_cast<char*>(view.ptr) + count * view.row_stride * element_size;
  return view;
}

const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace

void check_index(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                 at::IntArrayRef index_map) {
  check_floating(op, "q_index", q_index);
  check_floating(op, "k_index", k_index);
  check_tensor(op, "q_index", q_index, "[B, R, M, r]",
               {kAnySize, static_cast<int64_t>(index_map.size()), kAnySize, kAnySize});
  check_tensor(op, "k_index", k_index, "[B, Rk, N, r]",
               {q_index.size(0), kAnySize, kAnySize, q_index.size(3)});
  check_device(op, "k_index", k_index, "q_index", q_index);
  TORCH_CHECK_VALUE(q_index.size(3) > 0, "rtpurbo::", op,
                    ": q_index must have an index dim r > 0, got shape ", q_index.sizes());
  TORCH_CHECK_VALUE(k_index.size(2) <= INT32_MAX, "rtpurbo::", op,
                    ": k_index must have N <= 2^31 - 1, got ", k_index.size(2));
  for (const int64_t head : index_map) {
    TORCH_CHECK_VALUE(head >= 0 && head < k_index.size(1), "rtpurbo::", op,
                      ": index_map must be heads of k_index in [0, ", k_index.size(1), "), got ",
                      index_map);
  }
}

void check_selection(const char* op, double p, int64_t min_tokens, int64_t block_size) {
  TORCH_CHECK_VALUE(p > 0 && p <= 1, "rtpurbo::", op, ": p must be in (0, 1], got ", p);
  TORCH_CHECK_VALUE(min_tokens >= 0, "rtpurbo::", op, ": min_tokens must be >= 0, got ",
                    min_tokens);
  TORCH_CHECK_VALUE(block_size == 1 || block_size == 16 || block_size == 32 || block_size == 64,
                    "rtpurbo::", op, ": block_size must be 1, 16, 32 or 64, got ", block_size);
}

int64_t min_members(int64_t min_tokens, int64_t block_size) {
  return min_tokens / block_size + (min_tokens % block_size != 0);
}

at::Tensor per_head(const char* op, const char* name, const std::optional<at::Tensor>& values,
                    const at::Tensor& q_index, at::ScalarType dtype) {
  if (!values) return {};
  check_floating(op, name, *values);
  check_tensor(op, name, *values, "[R]", {q_index.size(1)});
  check_device(op, name, *values, "q_index", q_index);
  return values->to(dtype).contiguous();
}

at::ScalarType accumulation_type(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble
                                                                          : at::kFloat;
}

at::Tensor with_dequantised(const at::Tensor& k_index, const at::Tensor& codes,
                            const at::Tensor& ranges) {
  const int64_t dim = k_index.size(3);
  const bool bytes = codes.size(3) == dim;
  const at::Tensor values =
      bytes ? codes
            : at::cat({at::bitwise_and(codes, 15), at::bitwise_right_shift(codes, 4)}, -1)
                  .narrow(-1, 0, dim);
  const at::Tensor of_block = ranges.to(at::kFloat).repeat_interleave(kIndexBlock, 2);
  const at::Tensor keys = at::addcmul(of_block.narrow(-1, 0, dim), of_block.narrow(-1, dim, dim),
                                      values.to(at::kFloat));
  const at::ScalarType type = k_index.scalar_type() == at::kHalf ? at::kHalf : at::kFloat;
  return at::cat({keys.to(type), k_index.to(type)}, 2);
}

IndexArguments::IndexArguments(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                               at::IntArrayRef index_map, int64_t window, int64_t sinks,
                               int64_t block_size, const std::optional<at::Tensor>& near_lse,
                               const std::optional<at::Tensor>& offset,
                               const std::optional<at::Tensor>& start, const Quantised& quantised) {
  check_index(op, q_index, k_index, index_map);
  const int64_t coded = check_quantised(op, q_index, k_index, quantised);
  const int64_t of_both = quantised.refine ? coded : 0;  // keys of codes that k_index holds, too
  const int64_t keys = coded + k_index.size(2) - of_both;
  TORCH_CHECK_VALUE(!quantised.refine || block_size == 1, "rtpurbo::", op,
                    ": block_size must be 1 with refine, which scores single keys again, got ",
                    block_size);
  TORCH_CHECK_VALUE(keys >= q_index.size(2), "rtpurbo::", op,
                    ": k_index must hold at least the keys of the ", q_index.size(2),
                    " query rows, got N = ", keys);
  check_mask(op, window, sinks, 1.0);
  check_start(op, start, "q_index", q_index);
  const at::ScalarType accum = accumulation_type(q_index, k_index);
  near_lse_ = per_row(op, near_lse, q_index, accum);
  offset_ = per_head(op, "offset", offset, q_index, accum);
  params_ = {.q_dtype = q_index.scalar_type(),
             .k_dtype = k_index.scalar_type(),
             .accum = accum,
             .q_index = heads_view(q_index),
             .k_index = skip_rows(heads_view(k_index), of_both, k_index.element_size()),
             .codes = quantised.codes ? heads_view(*quantised.codes) : HeadsView{},
             .ranges = quantised.ranges ? heads_view(*quantised.ranges) : HeadsView{},
             // A single dimension's 4-bit codes have empty upper halves: they read as 8-bit ones.
             .code_bits = quantised.codes && quantised.codes->size(3) == q_index.size(3) ? 8 : 4,
             .coded = coded,
             .refine = quantised.refine,
             .index_map = index_map.data(),
             .near_lse_ptr = data_or_null(near_lse_),
             .offset_ptr = data_or_null(offset_),
             .start_ptr = start_ptr(start, start_),
             .batch = q_index.size(0),
             .heads = q_index.size(1),
             .key_heads = k_index.size(1),
             .rows = q_index.size(2),
             .keys = keys,
             .dim = q_index.size(3),
             .window = std::min(window, keys),
             .sinks = std::min(sinks, keys),
             .block_size = block_size};
}

int64_t IndexArguments::room(int64_t capacity) const {
  return capacity > 0 ? capacity : (params_.keys + params_.block_size - 1) / params_.block_size;
}

}  // namespace rtpurbo
