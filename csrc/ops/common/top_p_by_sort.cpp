#include "csrc/ops/common/top_p_by_sort.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>

namespace rtpurbo {

std::tuple<at::Tensor, at::Tensor, at::Tensor> top_p_by_sort(
    const at::Tensor& scores, double p, int64_t min_members,
    const std::optional<at::Tensor>& forced_lse) {
  const int64_t n = scores.size(1);
  const at::Tensor wide = scores.to(at::kDouble);
  const auto [values, order] = at::sort(wide, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const at::Tensor forced = forced_lse ? forced_lse->to(at::kDouble).unsqueeze(1)
                                       : at::full_like(values.narrow(1, 0, 1), -INFINITY);
  const at::Tensor poisoned =
      (wide < INFINITY).all(1, /*keepdim=*/true).logical_and(forced < INFINITY).logical_not();
  const at::Tensor candidates = (wide != -INFINITY).sum(1, /*keepdim=*/true);

  const at::Tensor top = at::maximum(values.narrow(1, 0, 1), forced);
  const at::Tensor reference = at::where(top.isfinite(), top, 0.0);  // else no exponential is one
  const at::Tensor outside = (forced - reference).exp();
  const at::Tensor reached = at::cumsum((values - reference).exp(), 1) + outside;
  const at::Tensor total = reached.narrow(1, n - 1, 1);
  const at::Tensor target = p * total;
  at::Tensor count = (reached < target).sum(1, /*keepdim=*/true) + (outside < target);
  count = at::minimum(at::maximum(count, candidates.clamp_max(min_members)), candidates);
  count = p < 1.0 ? at::where(poisoned, candidates, count) : candidates;

  const at::Tensor place = at::arange(n, order.options());
  const at::Tensor members =
      std::get<0>(at::sort(at::where(place < count, order, n), 1, /*descending=*/false));
  const at::Tensor last = reached.gather(1, (count - 1).clamp_min(0));
  at::Tensor mass = (at::where(count > 0, last, outside) / total).clamp_max(1.0);
  if (p >= 1.0) mass = at::ones_like(mass);
  mass = at::where(top == -INFINITY, 1.0, mass).masked_fill(poisoned, NAN);
  return {members.masked_fill(members == n, -1).to(at::kInt), count.squeeze(1).to(at::kInt),
          mass.squeeze(1).to(at::toOpMathType(scores.scalar_type()))};
}

}  // namespace rtpurbo
