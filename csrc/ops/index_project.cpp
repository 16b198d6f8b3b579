#include "csrc/ops/index_project.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/index_project.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/index_project.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "index_project";

using Result = std::tuple<at::Tensor, at::Tensor>;

void check_side(const char* x_name, const char* w_name, const char* heads_name, const at::Tensor& x,
                const at::Tensor& w, at::IntArrayRef heads) {
  check_floating(kOp, x_name, x);
  check_floating(kOp, w_name, w);
  check_tensor(kOp, x_name, x, "[B, H, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_tensor(kOp, w_name, w, "[heads, r, D]",
               {static_cast<int64_t>(heads.size()), kAnySize, x.size(3)});
  check_device(kOp, w_name, w, x_name, x);
  for (const int64_t head : heads) {
    TORCH_CHECK_VALUE(head >= 0 && head < x.size(1), "rtpurbo::index_project: ", heads_name,
                      " must be head numbers in [0, ", x.size(1), "), got ", heads);
  }
}

/// Checks both sides, and returns the dtype of the results.
at::ScalarType check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                     const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                     std::optional<at::ScalarType> dtype) {
  check_side("q", "w_q", "q_heads", q, w_q, q_heads);
  check_side("k", "w_k", "k_heads", k, w_k, k_heads);
  TORCH_CHECK_VALUE(k.size(0) == q.size(0) && k.size(3) == q.size(3),
                    "rtpurbo::index_project: k must have shape [B, Hk, Mk, D] = [", q.size(0),
                    ", *, *, ", q.size(3), "] like q, got ", k.sizes());
  check_dtype(kOp, "k", k, q.scalar_type());
  check_device(kOp, "k", k, "q", q);
  check_dtype(kOp, "w_k", w_k, w_q.scalar_type());
  TORCH_CHECK_VALUE(w_q.size(1) == w_k.size(1),
                    "rtpurbo::index_project: w_q and w_k must have the same index dim, got ",
                    w_q.size(1), " and ", w_k.size(1));
  const at::ScalarType out = dtype.value_or(w_q.scalar_type());
  TORCH_CHECK_TYPE(at::isFloatingType(out),
                   "rtpurbo::index_project: dtype must be a floating type, got ", out);
  return out;
}

at::Tensor allocate(const at::Tensor& x, const at::Tensor& w, at::ScalarType dtype) {
  return at::empty({x.size(0), w.size(0), x.size(2), w.size(1)}, x.options().dtype(dtype));
}

at::Tensor project(const at::Tensor& x, const at::Tensor& w, at::IntArrayRef heads,
                   at::ScalarType dtype) {
  const at::Tensor out = allocate(x, w, dtype);
  const at::Tensor weights = w.contiguous();
  cpu::index_project_kernel({.x_dtype = x.scalar_type(),
                             .w_dtype = w.scalar_type(),
                             .out_dtype = dtype,
                             .x = heads_view(x),
                             .out = heads_view(out),
                             .w_ptr = weights.const_data_ptr(),
                             .heads = heads.data(),
                             .batch = x.size(0),
                             .outputs = w.size(0),
                             .rows = x.size(2),
                             .dim = x.size(3),
                             .index_dim = w.size(1)});
  return out;
}

Result index_project_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                         const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                         std::optional<at::ScalarType> dtype) {
  const at::ScalarType out = check(q, k, w_q, w_k, q_heads, k_heads, dtype);
  return {project(q, w_q, q_heads, out), project(k, w_k, k_heads, out)};
}

#ifdef RTPURBO_WITH_CUDA
cuda::IndexProjectSide cuda_side(const char* heads_name, const at::Tensor& x, const at::Tensor& w,
                                 at::IntArrayRef heads, const at::Tensor& out) {
  return {.x = heads_view(x),
          .out = heads_view(out),
          .w_ptr = w.const_data_ptr(),
          .heads = cuda::head_list(kOp, heads_name, heads),
          .rows = x.size(2)};
}

Result index_project_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                          const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                          std::optional<at::ScalarType> dtype) {
  const at::ScalarType out = check(q, k, w_q, w_k, q_heads, k_heads, dtype);
  cuda::check_not_double(kOp, "q", q.scalar_type());
  cuda::check_not_double(kOp, "w_q", w_q.scalar_type());
  cuda::check_not_double(kOp, "dtype", out);
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor q_weights = w_q.contiguous();
  const at::Tensor k_weights = w_k.contiguous();
  Result result{allocate(q, w_q, out), allocate(k, w_k, out)};
  RTPURBO_CUDA_CHECK(kOp,
                     cuda::launch_index_project(
                         {.x_type = cuda::element_type(q.scalar_type()),
                          .w_type = cuda::element_type(w_q.scalar_type()),
                          .out_type = cuda::element_type(out),
                          .q = cuda_side("q_heads", q, q_weights, q_heads, std::get<0>(result)),
                          .k = cuda_side("k_heads", k, k_weights, k_heads, std::get<1>(result)),
                          .batch = q.size(0),
                          .dim = q.size(3),
                          .index_dim = w_q.size(1)},
                         c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

Result index_project_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w,
                                  at::IntArrayRef heads, std::array<bool, 2> wanted) {
  check_side("x", "w", "heads", x, w, heads);
  check_floating(kOp, "grad", grad);
  const at::Tensor rows = grad.contiguous();
  check_tensor(kOp, "grad", rows, "[B, R, M, r]", {x.size(0), w.size(0), x.size(2), w.size(1)});
  const at::Tensor weights = w.contiguous();
  const at::Tensor grad_x = at::empty(wanted[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  const at::Tensor grad_w = at::empty(wanted[1] ? w.sizes() : at::IntArrayRef{0}, w.options());
  cpu::index_project_backward_kernel({.grad_dtype = grad.scalar_type(),
                                      .x_dtype = x.scalar_type(),
                                      .w_dtype = w.scalar_type(),
                                      .grad = heads_view(rows),
                                      .x = heads_view(x),
                                      .w_ptr = weights.const_data_ptr(),
                                      .heads = heads.data(),
                                      .grad_x_ptr = wanted[0] ? grad_x.mutable_data_ptr() : nullptr,
                                      .grad_w_ptr = wanted[1] ? grad_w.mutable_data_ptr() : nullptr,
                                      .batch = x.size(0),
                                      .x_heads = x.size(1),
                                      .outputs = w.size(0),
                                      .rows = x.size(2),
                                      .dim = x.size(3),
                                      .index_dim = w.size(1)});
  return {grad_x, grad_w};
}

}  // namespace

Result index_project(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                     const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                     std::optional<at::ScalarType> dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::index_project", "")
                             .typed<decltype(index_project)>();
  return op.call(q, k, w_q, w_k, q_heads, k_heads, dtype);
}

Result index_project_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w,
                              at::IntArrayRef heads, std::array<bool, 2> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::index_project_backward", "")
                             .typed<decltype(index_project_backward)>();
  return op.call(grad, x, w, heads, wanted);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "index_project(Tensor q, Tensor k, Tensor w_q, Tensor w_k, int[] q_heads, int[] k_heads,"
      " ScalarType? dtype=None) -> (Tensor q_index, Tensor k_index)");
  m.def(
      "index_project_backward(Tensor grad, Tensor x, Tensor w, int[] heads, bool[2] wanted)"
      " -> (Tensor grad_x, Tensor grad_w)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) {
  m.impl("index_project", &index_project_cpu);
  m.impl("index_project_backward", &index_project_backward_cpu);
}
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("index_project", &index_project_cuda); }
#endif

}  // namespace rtpurbo
