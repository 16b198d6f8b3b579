#include "csrc/ops/cache.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/cpu/cache.h"
#include "csrc/ops/common/cache_arguments.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/cache.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

using Unrolled = std::tuple<at::Tensor, at::Tensor>;

void check_index_store(const char* op, const at::Tensor& k_index, const at::Tensor& index_pages,
                       int64_t slot) {
  check_store(op, "index_pages", index_pages, k_index, k_index.size(1));
  check_capacity(op, "index_pages", index_pages, slot, k_index.size(2));
}

void check_with_index(const AppendArguments& a, const std::optional<at::Tensor>& k_index,
                      const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  constexpr const char* kOp = "cache_append";
  check_append(kOp, a);
  check_pair(kOp, "k_index", k_index, "index_pages", index_pages);
  TORCH_CHECK_VALUE(index_slot == kAtPosition || (k_index && index_slot >= 0), "rtpurbo::", kOp,
                    ": index_slot must be >= 0, or -1 for position, as without k_index, got ",
                    index_slot);
  if (!k_index) return;
  check_tensor(kOp, "k_index", *k_index, "[B, Rk, M, r]",
               {a.k.size(0), kAnySize, a.k.size(2), kAnySize});
  check_device(kOp, "k_index", *k_index, "k", a.k);
  check_index_store(kOp, *k_index, *index_pages, slot_of(index_slot, a.position));
}

void check_append_index(const at::Tensor& k_index, const at::Tensor& index_pages,
                        int64_t position) {
  constexpr const char* kOp = "cache_append_index";
  check_tensor(kOp, "k_index", k_index, "[B, Rk, M, r]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_position(kOp, position, k_index.size(2), 0);
  check_index_store(kOp, k_index, index_pages, position);
}

/// Checks the arguments of cache_unroll, and returns keys and start_local to be filled.
Unrolled check_and_allocate(const at::Tensor& ring, const at::Tensor& added,
                            at::IntArrayRef local_heads, int64_t position, int64_t sinks,
                            const std::optional<at::Tensor>& start) {
  constexpr const char* kOp = "cache_unroll";
  check_tensor(kOp, "new", added, "[B, Hk, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_position(kOp, position, added.size(2), sinks);
  check_heads(kOp, "local_heads", local_heads, added.size(1));
  check_store(kOp, "ring", ring, added, static_cast<int64_t>(local_heads.size()));
  check_ring(kOp, "ring", ring, sinks);
  check_start(kOp, start, "new", added);
  return {at::empty({ring.size(0), ring.size(1), ring.size(2) + added.size(2), ring.size(3)},
                    ring.options()),
          at::empty({ring.size(0)}, ring.options().dtype(at::kLong))};
}

void cache_append_cpu(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring,
                      at::Tensor& v_ring, at::Tensor& k_pages, at::Tensor& v_pages,
                      at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                      const std::optional<at::Tensor>& start,
                      const std::optional<at::Tensor>& k_index,
                      const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  const AppendArguments arguments{k,       v,          k_ring,   v_ring, k_pages,
                                  v_pages, full_heads, position, sinks,  start};
  check_with_index(arguments, k_index, index_pages, index_slot);
  append_on_cpu(arguments);
  if (k_index) append_to_pages_on_cpu(*k_index, *index_pages, slot_of(index_slot, position));
}

void cache_append_index_cpu(const at::Tensor& k_index, at::Tensor& index_pages, int64_t position) {
  check_append_index(k_index, index_pages, position);
  append_to_pages_on_cpu(k_index, index_pages, position);
}

Unrolled cache_unroll_cpu(const at::Tensor& ring, const at::Tensor& added,
                          at::IntArrayRef local_heads, int64_t position, int64_t sinks,
                          const std::optional<at::Tensor>& start) {
  Unrolled result = check_and_allocate(ring, added, local_heads, position, sinks, start);
  auto& [keys, start_local] = result;
  at::Tensor start_kept;
  cpu::cache_unroll_kernel({.ring = bytes_view(ring),
                            .source = bytes_view(added),
                            .target = bytes_view(keys),
                            .heads = local_heads.data(),
                            .start_ptr = start_ptr(start, start_kept),
                            .start_local_ptr = start_local.mutable_data_ptr<int64_t>(),
                            .batch = ring.size(0),
                            .heads_count = ring.size(1),
                            .rows = added.size(2),
                            .row_bytes = added.size(3) * added.element_size(),
                            .position = position,
                            .sinks = sinks,
                            .window = ring.size(2) - sinks});
  return result;
}

#ifdef RTPURBO_WITH_CUDA
void put_index(cuda::CacheAppendParams& params, const at::Tensor& k_index,
               const at::Tensor& index_pages, int64_t slot) {
  params.index.source = bytes_view(k_index);
  params.index.pages = bytes_view(index_pages);
  params.index.row_bytes = k_index.size(3) * k_index.element_size();
  params.index_heads = static_cast<int32_t>(k_index.size(1));
  params.index_slot = slot;
}

void cache_append_cuda(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring,
                       at::Tensor& v_ring, at::Tensor& k_pages, at::Tensor& v_pages,
                       at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                       const std::optional<at::Tensor>& start,
                       const std::optional<at::Tensor>& k_index,
                       const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  const AppendArguments arguments{k,       v,          k_ring,   v_ring, k_pages,
                                  v_pages, full_heads, position, sinks,  start};
  check_with_index(arguments, k_index, index_pages, index_slot);
  const c10::cuda::CUDAGuard guard(k.device());
  at::Tensor start_kept;
  cuda::CacheAppendParams params = append_params("cache_append", arguments, start_kept);
  if (k_index) put_index(params, *k_index, *index_pages, slot_of(index_slot, position));
  RTPURBO_CUDA_CHECK("cache_append",
                     cuda::launch_cache_append(params, c10::cuda::getCurrentCUDAStream()));
}

void cache_append_index_cuda(const at::Tensor& k_index, at::Tensor& index_pages, int64_t position) {
  constexpr const char* kOp = "cache_append_index";
  check_append_index(k_index, index_pages, position);
  const c10::cuda::CUDAGuard guard(k_index.device());
  cuda::CacheAppendParams params{.batch = k_index.size(0), .rows = k_index.size(2)};
  put_index(params, k_index, index_pages, position);
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_cache_append(params, c10::cuda::getCurrentCUDAStream()));
}

Unrolled cache_unroll_cuda(const at::Tensor& ring, const at::Tensor& added,
                           at::IntArrayRef local_heads, int64_t position, int64_t sinks,
                           const std::optional<at::Tensor>& start) {
  Unrolled result = check_and_allocate(ring, added, local_heads, position, sinks, start);
  auto& [keys, start_local] = result;
  const c10::cuda::CUDAGuard guard(ring.device());
  at::Tensor start_kept;
  RTPURBO_CUDA_CHECK(
      "cache_unroll",
      cuda::launch_cache_unroll({.ring = bytes_view(ring),
                                 .source = bytes_view(added),
                                 .target = bytes_view(keys),
                                 .heads = cuda::head_list("cache_unroll", "new", local_heads),
                                 .start_ptr = start_ptr(start, start_kept),
                                 .start_local_ptr = start_local.mutable_data_ptr<int64_t>(),
                                 .batch = ring.size(0),
                                 .rows = added.size(2),
                                 .row_bytes = added.size(3) * added.element_size(),
                                 .position = position,
                                 .sinks = sinks,
                                 .window = ring.size(2) - sinks},
                                c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

}  // namespace

void cache_append(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring, at::Tensor& v_ring,
                  at::Tensor& k_pages, at::Tensor& v_pages, at::IntArrayRef full_heads,
                  int64_t position, int64_t sinks, const std::optional<at::Tensor>& start,
                  const std::optional<at::Tensor>& k_index,
                  const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::cache_append", "")
                             .typed<decltype(cache_append)>();
  op.call(k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start, k_index,
          index_pages, index_slot);
}

void cache_append_index(const at::Tensor& k_index, at::Tensor& index_pages, int64_t position) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::cache_append_index", "")
                             .typed<decltype(cache_append_index)>();
  op.call(k_index, index_pages, position);
}

std::tuple<at::Tensor, at::Tensor> cache_unroll(const at::Tensor& ring, const at::Tensor& added,
                                                at::IntArrayRef local_heads, int64_t position,
                                                int64_t sinks,
                                                const std::optional<at::Tensor>& start) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::cache_unroll", "")
                             .typed<decltype(cache_unroll)>();
  return op.call(ring, added, local_heads, position, sinks, start);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "cache_append(Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring, Tensor(c!) k_pages,"
      " Tensor(d!) v_pages, int[] full_heads, int position, int sinks, Tensor? start=None,"
      " Tensor? k_index=None, Tensor(e!)? index_pages=None, int index_slot=-1) -> ()");
  m.def("cache_append_index(Tensor k_index, Tensor(a!) index_pages, int position) -> ()");
  m.def(
      "cache_unroll(Tensor ring, Tensor new, int[] local_heads, int position, int sinks,"
      " Tensor? start=None) -> (Tensor keys, Tensor start_local)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) {
  m.impl("cache_append", &cache_append_cpu);
  m.impl("cache_append_index", &cache_append_index_cpu);
  m.impl("cache_unroll", &cache_unroll_cpu);
}
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) {
  m.impl("cache_append", &cache_append_cuda);
  m.impl("cache_append_index", &cache_append_index_cuda);
  m.impl("cache_unroll", &cache_unroll_cuda);
}
#endif

}  // namespace rtpurbo
