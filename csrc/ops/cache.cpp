#include "csrc/ops/cache.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "csrc/cpu/cache.h"
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

constexpr int64_t kPages = -1;
constexpr int64_t kPosition = -1;  // as an index slot

using Unrolled = std::tuple<at::Tensor, at::Tensor>;

HeadsView bytes_view(const at::Tensor& tensor) {
  HeadsView view = heads_view(tensor);
  const int64_t size = tensor.element_size();
  view.batch_stride *= size;
  view.head_stride *= size;
  view.row_stride *= size;
  return view;
}

void check_position(const char* op, int64_t position, int64_t rows, int64_t sinks) {
  TORCH_CHECK_VALUE(position >= 0 && position <= INT64_MAX - rows, "rtpurbo::", op,
                    ": position must be >= 0, and that of every token fit int64, got ", position);
  TORCH_CHECK_VALUE(sinks >= 0, "rtpurbo::", op, ": sinks must be >= 0, got ", sinks);
}

/// Checks one cache tensor [B, heads, slots, D] that takes rows of `source`.
void check_store(const char* op, const char* name, const at::Tensor& store,
                 const at::Tensor& source, int64_t heads) {
  check_tensor(op, name, store, "[B, heads, slots, D]",
               {source.size(0), heads, kAnySize, source.size(3)});
  check_dtype(op, name, store, source.scalar_type());
  check_device(op, name, store, "the new tokens", source);
}

void check_capacity(const char* op, const char* name, const at::Tensor& pages, int64_t slot,
                    int64_t rows) {
  TORCH_CHECK_VALUE(pages.size(1) == 0 || slot <= pages.size(2) - rows, "rtpurbo::", op, ": ", name,
                    " must have room for ", rows, " tokens from slot ", slot,
                    " on, got a capacity of ", pages.size(2), "; grow the pages first");
}

void check_ring(const char* op, const char* name, const at::Tensor& ring, int64_t sinks) {
  TORCH_CHECK_VALUE(ring.size(1) == 0 || ring.size(2) > sinks, "rtpurbo::", op, ": ", name,
                    " must have sinks + window slots, more than sinks = ", sinks, ", got ",
                    ring.size(2));
}

std::vector<int64_t> other_heads(at::IntArrayRef heads, int64_t num_heads) {
  std::vector<int64_t> others;
  for (int64_t head = 0; head < num_heads; ++head) {
    if (!std::binary_search(heads.begin(), heads.end(), head)) others.push_back(head);
  }
  return others;
}

std::vector<int64_t> every_head(int64_t num_heads) {
  std::vector<int64_t> heads(num_heads);
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

void check_index_store(const char* op, const at::Tensor& k_index, const at::Tensor& index_pages,
                       int64_t slot) {
  check_store(op, "index_pages", index_pages, k_index, k_index.size(1));
  check_capacity(op, "index_pages", index_pages, slot, k_index.size(2));
}

int64_t slot_of(int64_t index_slot, int64_t position) {
  return index_slot == kPosition ? position : index_slot;
}

void check_append(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_ring,
                  const at::Tensor& v_ring, const at::Tensor& k_pages, const at::Tensor& v_pages,
                  at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                  const std::optional<at::Tensor>& start, const std::optional<at::Tensor>& k_index,
                  const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  constexpr const char* kOp = "cache_append";
  check_tensor(kOp, "k", k, "[B, Hk, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_tensor(kOp, "v", v, "[B, Hk, M, D]", {k.size(0), k.size(1), k.size(2), kAnySize});
  check_device(kOp, "v", v, "k", k);
  check_position(kOp, position, k.size(2), sinks);
  check_heads(kOp, "full_heads", full_heads, k.size(1));
  check_start(kOp, start, "k", k);
  const int64_t full = static_cast<int64_t>(full_heads.size());
  const auto check_side = [&](const char* ring_name, const char* pages_name,
                              const at::Tensor& source, const at::Tensor& ring,
                              const at::Tensor& pages) {
    check_store(kOp, ring_name, ring, source, source.size(1) - full);
    check_store(kOp, pages_name, pages, source, full);
    check_ring(kOp, ring_name, ring, sinks);
    check_capacity(kOp, pages_name, pages, position, source.size(2));
  };
  check_side("k_ring", "k_pages", k, k_ring, k_pages);
  check_side("v_ring", "v_pages", v, v_ring, v_pages);
  TORCH_CHECK_VALUE(k_index.has_value() == index_pages.has_value(), "rtpurbo::", kOp, ": ",
                    k_index ? "index_pages" : "k_index", " must be given with ",
                    k_index ? "k_index" : "index_pages", ", got None");
  TORCH_CHECK_VALUE(index_slot == kPosition || (k_index && index_slot >= 0), "rtpurbo::", kOp,
                    ": index_slot must be >= 0, or -1 for position, as without k_index, got ",
                    index_slot);
  if (!k_index) return;
  check_tensor(kOp, "k_index", *k_index, "[B, Rk, M, r]",
               {k.size(0), kAnySize, k.size(2), kAnySize});
  check_device(kOp, "k_index", *k_index, "k", k);
  check_index_store(kOp, *k_index, *index_pages, slot_of(index_slot, position));
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

void append(const at::Tensor& source, const at::Tensor& target, at::IntArrayRef heads,
            int64_t position, int64_t sinks, int64_t slot_window, const int64_t* start) {
  if (heads.empty()) return;
  cpu::cache_append_kernel({.source = bytes_view(source),
                            .target = bytes_view(target),
                            .heads = heads.data(),
                            .start_ptr = start,
                            .batch = source.size(0),
                            .heads_count = static_cast<int64_t>(heads.size()),
                            .rows = source.size(2),
                            .row_bytes = source.size(3) * source.element_size(),
                            .position = position,
                            .sinks = sinks,
                            .slot_window = slot_window});
}

void append_index(const at::Tensor& k_index, const at::Tensor& index_pages, int64_t slot) {
  append(k_index, index_pages, every_head(k_index.size(1)), slot, 0, kPages, nullptr);
}

void cache_append_cpu(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring,
                      at::Tensor& v_ring, at::Tensor& k_pages, at::Tensor& v_pages,
                      at::IntArrayRef full_heads, int64_t position, int64_t sinks,
                      const std::optional<at::Tensor>& start,
                      const std::optional<at::Tensor>& k_index,
                      const std::optional<at::Tensor>& index_pages, int64_t index_slot) {
  check_append(k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start, k_index,
               index_pages, index_slot);
  const std::vector<int64_t> local = other_heads(full_heads, k.size(1));
  at::Tensor start_kept;
  const int64_t* starts = start_ptr(start, start_kept);
  append(k, k_pages, full_heads, position, sinks, kPages, starts);
  append(v, v_pages, full_heads, position, sinks, kPages, starts);
  append(k, k_ring, local, position, sinks, k_ring.size(2) - sinks, starts);
  append(v, v_ring, local, position, sinks, v_ring.size(2) - sinks, starts);
  if (k_index) append_index(*k_index, *index_pages, slot_of(index_slot, position));
}

void cache_append_index_cpu(const at::Tensor& k_index, at::Tensor& index_pages, int64_t position) {
  check_append_index(k_index, index_pages, position);
  append_index(k_index, index_pages, position);
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
cuda::CacheStore cuda_store(const at::Tensor& source, const at::Tensor& pages,
                            const at::Tensor& ring, int64_t sinks) {
  return {.source = bytes_view(source),
          .pages = bytes_view(pages),
          .ring = bytes_view(ring),
          .row_bytes = source.size(3) * source.element_size(),
          .window = ring.size(2) - sinks};
}

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
  check_append(k, v, k_ring, v_ring, k_pages, v_pages, full_heads, position, sinks, start, k_index,
               index_pages, index_slot);
  std::vector<int64_t> heads = full_heads.vec();
  const std::vector<int64_t> local = other_heads(full_heads, k.size(1));
  heads.insert(heads.end(), local.begin(), local.end());
  const c10::cuda::CUDAGuard guard(k.device());
  at::Tensor start_kept;
  cuda::CacheAppendParams params{
      .stores = {cuda_store(k, k_pages, k_ring, sinks), cuda_store(v, v_pages, v_ring, sinks)},
      .heads = cuda::head_list("cache_append", "k", heads),
      .page_heads = static_cast<int32_t>(full_heads.size()),
      .start_ptr = start_ptr(start, start_kept),
      .batch = k.size(0),
      .rows = k.size(2),
      .position = position,
      .sinks = sinks};
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
