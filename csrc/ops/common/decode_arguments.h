#pragma once
// What decode and sparse_decode check and hand to their kernels.

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "csrc/cpu/decode.h"

namespace rtpurbo {

/// The checked arguments as kernel parameters, with the results and the tensors that these point
/// into.
class DecodeArguments {
 public:
  /// With `listed` retrieval heads read lists, those of `indices` or the kernel's own.
  DecodeArguments(const char* op, bool listed, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, at::IntArrayRef retrieval_heads, int64_t window,
                  int64_t near_window, int64_t sinks, double scale,
                  const std::optional<at::Tensor>& indices, const std::optional<at::Tensor>& counts,
                  int64_t block_size, const std::optional<at::Tensor>& k_local,
                  const std::optional<at::Tensor>& v_local, const std::optional<at::Tensor>& start,
                  int64_t length);
  DecodeArguments(const DecodeArguments&) = delete;

  const cpu::DecodeParams& params() const { return params_; }

  /// out and lse.
  std::tuple<at::Tensor, at::Tensor> result() const { return {out_, lse_}; }

 private:
  at::Tensor out_, lse_, indices_, counts_, start_;
  std::vector<cpu::HeadSet> sets_;
  cpu::DecodeParams params_;
};

}  // namespace rtpurbo
