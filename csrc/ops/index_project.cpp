#include "csrc/ops/index_project.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/index_project.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#include "csrc/ops/common/projection.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/index_project.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "index_project";

using Result = std::tuple<at::Tensor, at::Tensor>;

/// The arguments by side.
struct Sides {
  Projection q, k;
};

Sides sides(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q, const at::Tensor& w_k,
            at::IntArrayRef q_heads, at::IntArrayRef k_heads) {
  return {{"q", "w_q", "q_heads", q, w_q, q_heads}, {"k", "w_k", "k_heads", k, w_k, k_heads}};
}

/// Checks both sides, and returns the dtype of the results.
at::ScalarType check(const Sides& in, std::optional<at::ScalarType> dtype) {
  check_projections(kOp, in.q, in.k);
  const at::ScalarType out = dtype.value_or(in.q.w.scalar_type());
  TORCH_CHECK_TYPE(at::isFloatingType(out),
                   "rtpurbo::index_project: dtype must be a floating type, got ", out);
  return out;
}

Result index_project_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                         const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                         std::optional<at::ScalarType> dtype) {
  const Sides in = sides(q, k, w_q, w_k, q_heads, k_heads);
  const at::ScalarType out = check(in, dtype);
  Result result{empty_projection(in.q, out), empty_projection(in.k, out)};
  project_on_cpu(in.q, std::get<0>(result));
  project_on_cpu(in.k, std::get<1>(result));
  return result;
}

#ifdef RTPURBO_WITH_CUDA
Result index_project_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& w_q,
                          const at::Tensor& w_k, at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                          std::optional<at::ScalarType> dtype) {
  const Sides in = sides(q, k, w_q, w_k, q_heads, k_heads);
  const at::ScalarType out = check(in, dtype);
  const c10::cuda::CUDAGuard guard(q.device());
  Result result{empty_projection(in.q, out), empty_projection(in.k, out)};
  std::array<at::Tensor, 2> weights_kept;
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_index_project(
                              projection_params(kOp, in.q, in.k, "dtype", std::get<0>(result),
                                                std::get<1>(result), weights_kept),
                              c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

Result index_project_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w,
                                  at::IntArrayRef heads, std::array<bool, 2> wanted) {
  check_projection(kOp, {"x", "w", "heads", x, w, heads});
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
