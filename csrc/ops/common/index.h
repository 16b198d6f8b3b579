#pragma once
// Checks that the operators on index queries and index keys share.

#include <ATen/core/Tensor.h>

#include <optional>

#include "csrc/cpu/index_params.h"

namespace rtpurbo {

/// Checks a floating [R] tensor, and returns it contiguous as `dtype`; undefined when absent.
at::Tensor per_head(const char* op, const char* name, const std::optional<at::Tensor>& values,
                    const at::Tensor& q_index, at::ScalarType dtype);

/// Float64 when one of the two is, otherwise float32.
at::ScalarType accumulation_type(const at::Tensor& a, const at::Tensor& b);

/// Checks q_index [B, R, M, r] and k_index [B, Rk, N, r], floating and on one device, and that
/// index_map gives a head of k_index for each of the R queries.
void check_index(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                 at::IntArrayRef index_map);

/// Checks p in (0, 1], min_tokens >= 0 and a block_size of 1, 16, 32 or 64.
void check_selection(const char* op, double p, int64_t min_tokens, int64_t block_size);

/// min_tokens in members, rounded up.
int64_t min_members(int64_t min_tokens, int64_t block_size);

/// Index keys before those of k_index, as quantize_index makes them; both or neither. With `refine`
/// k_index holds all keys, the quantised ones too.
struct Quantised {
  const std::optional<at::Tensor>& codes;
  const std::optional<at::Tensor>& ranges;
  bool refine = false;
};

/// All keys [B, Rk, N, r], those of the codes first: half where k_index [B, Rk, N - Q, r] is, which
/// rounds them once more, and float32 otherwise.
at::Tensor with_dequantised(const at::Tensor& k_index, const at::Tensor& codes,
                            const at::Tensor& ranges);

/// The checked arguments of a selecting operator as kernel parameters, with the tensors that these
/// point into. q_index, k_index, index_map and the quantised keys must outlive it.
class IndexArguments {
 public:
  IndexArguments(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                 at::IntArrayRef index_map, int64_t window, int64_t sinks, int64_t block_size,
                 const std::optional<at::Tensor>& near_lse, const std::optional<at::Tensor>& offset,
                 const std::optional<at::Tensor>& start, const Quantised& quantised);

  const cpu::IndexParams& params() const { return params_; }

  /// Room in a list: `capacity`, or every block where it is 0.
  int64_t room(int64_t capacity) const;

 private:
  at::Tensor near_lse_, offset_, start_;
  cpu::IndexParams params_;
};

}  // namespace rtpurbo
