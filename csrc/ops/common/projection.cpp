#include "csrc/ops/common/projection.h"

#include <ATen/Functions.h>

#include "csrc/cpu/index_project.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {

void check_projection(const char* op, const Projection& side) {
  const at::Tensor& x = side.x;
  check_floating(op, side.x_name, x);
  check_floating(op, side.w_name, side.w);
  check_tensor(op, side.x_name, x, "[B, H, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  TORCH_CHECK_VALUE(x.size(3) > 0, "rtpurbo::", op, ": ", side.x_name,
                    " must have a head dim D >= 1, got ", x.sizes());
  check_tensor(op, side.w_name, side.w, "[heads, r, D]",
               {static_cast<int64_t>(side.heads.size()), kAnySize, x.size(3)});
  TORCH_CHECK_VALUE(side.w.size(1) > 0, "rtpurbo::", op, ": ", side.w_name,
                    " must have an index dim r >= 1, got ", side.w.sizes());
  check_device(op, side.w_name, side.w, side.x_name, x);
  for (const int64_t head : side.heads) {
    TORCH_CHECK_VALUE(head >= 0 && head < x.size(1), "rtpurbo::", op, ": ", side.heads_name,
                      " must be head numbers in [0, ", x.size(1), "), got ", side.heads);
  }
}

void check_projections(const char* op, const Projection& q, const Projection& k) {
  check_projection(op, q);
  check_projection(op, k);
  TORCH_CHECK_VALUE(k.x.size(0) == q.x.size(0) && k.x.size(3) == q.x.size(3), "rtpurbo::", op, ": ",
                    k.x_name, " must have shape [B, Hk, Mk, D] = [", q.x.size(0), ", *, *, ",
                    q.x.size(3), "] like ", q.x_name, ", got ", k.x.sizes());
  check_dtype(op, k.x_name, k.x, q.x.scalar_type());
  check_device(op, k.x_name, k.x, q.x_name, q.x);
  check_dtype(op, k.w_name, k.w, q.w.scalar_type());
  TORCH_CHECK_VALUE(q.w.size(1) == k.w.size(1), "rtpurbo::", op, ": ", q.w_name, " and ", k.w_name,
                    " must have the same index dim, got ", q.w.size(1), " and ", k.w.size(1));
}

at::Tensor empty_projection(const Projection& side, at::ScalarType dtype) {
  return at::empty({side.x.size(0), side.w.size(0), side.x.size(2), side.w.size(1)},
                   side.x.options().dtype(dtype));
}

void project_on_cpu(const Projection& side, const at::Tensor& out) {
  const at::Tensor weights = side.w.contiguous();
  cpu::index_project_kernel({.x_dtype = side.x.scalar_type(),
                             .w_dtype = weights.scalar_type(),
                             .out_dtype = out.scalar_type(),
                             .x = heads_view(side.x),
                             .out = heads_view(out),
                             .w_ptr = weights.const_data_ptr(),
                             .heads = side.heads.data(),
                             .batch = side.x.size(0),
                             .outputs = weights.size(0),
                             .rows = side.x.size(2),
                             .dim = side.x.size(3),
                             .index_dim = weights.size(1)});
}

#ifdef RTPURBO_WITH_CUDA
cuda::IndexProjectParams projection_params(const char* op, const Projection& q, const Projection& k,
                                           const char* out_name, const at::Tensor& q_out,
                                           const at::Tensor& k_out,
                                           std::array<at::Tensor, 2>& weights_kept) {
  cuda::check_not_double(op, q.x_name, q.x.scalar_type());
  cuda::check_not_double(op, q.w_name, q.w.scalar_type());
  cuda::check_not_double(op, out_name, q_out.scalar_type());
  weights_kept = {q.w.contiguous(), k.w.contiguous()};
  const auto side = [&](const Projection& from, const at::Tensor& weights, const at::Tensor& out) {
    return cuda::IndexProjectSide{.x = heads_view(from.x),
                                  .out = heads_view(out),
                                  .w_ptr = weights.const_data_ptr(),
                                  .heads = cuda::head_list(op, from.heads_name, from.heads),
                                  .rows = from.x.size(2)};
  };
  return {.x_type = cuda::element_type(q.x.scalar_type()),
          .w_type = cuda::element_type(q.w.scalar_type()),
          .out_type = cuda::element_type(q_out.scalar_type()),
          .q = side(q, weights_kept[0], q_out),
          .k = side(k, weights_kept[1], k_out),
          .batch = q.x.size(0),
          .dim = q.x.size(3),
          .index_dim = q.w.size(1)};
}
#endif

}  // namespace rtpurbo
