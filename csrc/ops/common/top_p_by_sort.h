#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// top_p of checked arguments with N > 0 by a stable descending sort in float64, on any device.
std::tuple<at::Tensor, at::Tensor, at::Tensor> top_p_by_sort(
    const at::Tensor& scores, double p, int64_t min_members,
    const std::optional<at::Tensor>& forced_lse);

}  // namespace rtpurbo
