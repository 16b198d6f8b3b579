#include "csrc/ops/cache_append_projected.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/ops/common/cache_arguments.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/projection.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/cache_append_projected.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "cache_append_projected";

struct Arguments {
  AppendArguments append;
  Projection q, k;
  const at::Tensor& index_pages;
  int64_t index_slot;
};

void check(const Arguments& a) {
  const at::Tensor& k = a.append.k;
  check_append(kOp, a.append);
  check_tensor(kOp, "q_pre", a.q.x, "[B, Hq, M, D]", {k.size(0), kAnySize, k.size(2), kAnySize});
  check_tensor(kOp, "k_pre", a.k.x, "[B, Hk, M, D]", {k.size(0), k.size(1), k.size(2), kAnySize});
  check_device(kOp, "q_pre", a.q.x, "k", k);
  check_projections(kOp, a.q, a.k);
  check_floating(kOp, "index_pages", a.index_pages);
  check_tensor(kOp, "index_pages", a.index_pages, "[B, Rk, capacity, r]",
               {k.size(0), a.k.w.size(0), kAnySize, a.k.w.size(1)});
  check_device(kOp, "index_pages", a.index_pages, "k", k);
  TORCH_CHECK_VALUE(a.index_slot == kAtPosition || a.index_slot >= 0, "rtpurbo::", kOp,
                    ": index_slot must be >= 0, or -1 for position, got ", a.index_slot);
  check_capacity(kOp, "index_pages", a.index_pages, slot_of(a.index_slot, a.append.position),
                 k.size(2));
}

/// The slots that the new index keys take.
at::Tensor index_slots(const Arguments& a) {
  if (a.index_pages.size(1) == 0) return a.index_pages;
  return a.index_pages.narrow(2, slot_of(a.index_slot, a.append.position), a.append.k.size(2));
}

at::Tensor run_on_cpu(const Arguments& a) {
  at::Tensor q_index = empty_projection(a.q, a.index_pages.scalar_type());
  project_on_cpu(a.q, q_index);
  project_on_cpu(a.k, index_slots(a));
  append_on_cpu(a.append);
  return q_index;
}

#ifdef RTPURBO_WITH_CUDA
at::Tensor run_on_cuda(const Arguments& a) {
  const c10::cuda::CUDAGuard guard(a.append.k.device());
  at::Tensor q_index = empty_projection(a.q, a.index_pages.scalar_type());
  at::Tensor start_kept;
  std::array<at::Tensor, 2> weights_kept;
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_cache_append_projected(
                              {.index = projection_params(kOp, a.q, a.k, "index_pages", q_index,
                                                          index_slots(a), weights_kept),
                               .rows = append_params(kOp, a.append, start_kept)},
                              c10::cuda::getCurrentCUDAStream()));
  return q_index;
}
#endif

template <at::Tensor (*kRun)(const Arguments&)>
at::Tensor checked(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring, at::Tensor& v_ring,
                   at::Tensor& k_pages, at::Tensor& v_pages, at::IntArrayRef full_heads,
                   int64_t position, int64_t sinks, const at::Tensor& q_pre,
                   const at::Tensor& k_pre, const at::Tensor& w_q, const at::Tensor& w_k,
                   at::IntArrayRef q_heads, at::IntArrayRef k_heads, at::Tensor& index_pages,
                   const std::optional<at::Tensor>& start, int64_t index_slot) {
  const Arguments a{{k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start},
                    {"q_pre", "w_q", "q_heads", q_pre, w_q, q_heads},
                    {"k_pre", "w_k", "k_heads", k_pre, w_k, k_heads},
                    index_pages,
                    index_slot};
  check(a);
  return kRun(a);
}

}  // namespace

at::Tensor cache_append_projected(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring,
                                  at::Tensor& v_ring, at::Tensor& k_pages, at::Tensor& v_pages,
                                  at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                                  const at::Tensor& q_pre, const at::Tensor& k_pre,
                                  const at::Tensor& w_q, const at::Tensor& w_k,
                                  at::IntArrayRef q_heads, at::IntArrayRef k_heads,
                                  at::Tensor& index_pages, const std::optional<at::Tensor>& start,
                                  int64_t index_slot) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::cache_append_projected", "")
                             .typed<decltype(cache_append_projected)>();
  return op.call(k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, q_pre, k_pre,
                 w_q, w_k, q_heads, k_heads, index_pages, start, index_slot);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "cache_append_projected(Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring,"
      " Tensor(c!) k_pages, Tensor(d!) v_pages, int[] full_heads, int position, int sinks,"
      " Tensor q_pre, Tensor k_pre, Tensor w_q, Tensor w_k, int[] q_heads, int[] k_heads,"
      " Tensor(e!) index_pages, Tensor? start=None, int index_slot=-1) -> Tensor q_index");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("cache_append_projected", &checked<run_on_cpu>); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("cache_append_projected", &checked<run_on_cuda>); }
#endif

}  // namespace rtpurbo
