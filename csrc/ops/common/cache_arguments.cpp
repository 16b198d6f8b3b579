#include "csrc/ops/common/cache_arguments.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "csrc/cpu/cache.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/ops/common/cuda_arguments.h"
#endif

namespace rtpurbo {
namespace {

constexpr int64_t kPages = -1;

std::vector<int64_t> other_heads(at::IntArrayRef heads, int64_t num_heads) {
  std::vector<int64_t> others;
  for (int64_t head = 0; head < num_heads; ++head) {
    if (!std::binary_search(heads.begin(), heads.end(), head)) others.push_back(head);
  }
  return others;
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

#ifdef RTPURBO_WITH_CUDA
cuda::CacheStore cuda_store(const at::Tensor& source, const at::Tensor& pages,
                            const at::Tensor& ring, int64_t sinks) {
  return {.source = bytes_view(source),
          .pages = bytes_view(pages),
          .ring = bytes_view(ring),
          .row_bytes = source.size(3) * source.element_size(),
          .window = ring.size(2) - sinks};
}
#endif

}  // namespace

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

void check_append(const char* op, const AppendArguments& a) {
  const at::Tensor& k = a.k;
  const at::Tensor& v = a.v;
  check_tensor(op, "k", k, "[B, Hk, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_tensor(op, "v", v, "[B, Hk, M, D]", {k.size(0), k.size(1), k.size(2), kAnySize});
  check_device(op, "v", v, "k", k);
  check_position(op, a.position, k.size(2), a.sinks);
  check_heads(op, "full_heads", a.full_heads, k.size(1));
  check_start(op, a.start, "k", k);
  const int64_t full = static_cast<int64_t>(a.full_heads.size());
  const auto check_side = [&](const char* ring_name, const char* pages_name,
                              const at::Tensor& source, const at::Tensor& ring,
                              const at::Tensor& pages) {
    check_store(op, ring_name, ring, source, source.size(1) - full);
    check_store(op, pages_name, pages, source, full);
    check_ring(op, ring_name, ring, a.sinks);
    check_capacity(op, pages_name, pages, a.position, source.size(2));
  };
  check_side("k_ring", "k_pages", k, a.k_ring, a.k_pages);
  check_side("v_ring", "v_pages", v, a.v_ring, a.v_pages);
}

void append_on_cpu(const AppendArguments& a) {
  const std::vector<int64_t> local = other_heads(a.full_heads, a.k.size(1));
  at::Tensor start_kept;
  const int64_t* starts = start_ptr(a.start, start_kept);
  append(a.k, a.k_pages, a.full_heads, a.position, a.sinks, kPages, starts);
  append(a.v, a.v_pages, a.full_heads, a.position, a.sinks, kPages, starts);
  append(a.k, a.k_ring, local, a.position, a.sinks, a.k_ring.size(2) - a.sinks, starts);
  append(a.v, a.v_ring, local, a.position, a.sinks, a.v_ring.size(2) - a.sinks, starts);
}

void append_to_pages_on_cpu(const at::Tensor& source, const at::Tensor& pages, int64_t slot) {
  std::vector<int64_t> every_head(source.size(1));
  std::iota(every_head.begin(), every_head.end(), 0);
  append(source, pages, every_head, slot, 0, kPages, nullptr);
}

#ifdef RTPURBO_WITH_CUDA
cuda::CacheAppendParams append_params(const char* op, const AppendArguments& a,
                                      at::Tensor& start_kept) {
  std::vector<int64_t> heads = a.full_heads.vec();
  const std::vector<int64_t> local = other_heads(a.full_heads, a.k.size(1));
  heads.insert(heads.end(), local.begin(), local.end());
  return {.stores = {cuda_store(a.k, a.k_pages, a.k_ring, a.sinks),
                     cuda_store(a.v, a.v_pages, a.v_ring, a.sinks)},
          .heads = cuda::head_list(op, "k", heads),
          .page_heads = static_cast<int32_t>(a.full_heads.size()),
          .start_ptr = start_ptr(a.start, start_kept),
          .batch = a.k.size(0),
          .rows = a.k.size(2),
          .position = a.position,
          .sinks = a.sinks};
}
#endif

}  // namespace rtpurbo
