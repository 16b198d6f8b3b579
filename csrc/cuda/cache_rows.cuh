#pragma once
// Where rows of a cache lie, and how they are copied: as bytes, in vectors.

#include <cuda_runtime.h>

#include "csrc/cuda/cache.h"

namespace rtpurbo::cuda {

__device__ __forceinline__ char* row_at(const HeadsView& view, int64_t batch, int64_t head,
                                        int64_t row) {
  return static_cast<char*>(view.ptr) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

__device__ __forceinline__ int64_t ring_slot(int64_t t, int64_t sinks, int64_t window) {
  return t < sinks ? t : sinks + (t - sinks) % window;
}

/// By `lanes` threads, of which the caller is `lane`. Zeros where `from` is null.
template <typename Vector>
__device__ __forceinline__ void copy_row(char* to, const char* from, int64_t bytes, unsigned lane,
                                         unsigned lanes) {
#pragma unroll 1  // rows are short
  for (int64_t i = lane * sizeof(Vector); i < bytes; i += lanes * sizeof(Vector)) {
    *reinterpret_cast<Vector*>(to + i) =
        from ? *reinterpret_cast<const Vector*>(from + i) : Vector{};
  }
}

/// One tensor of one head: units count the index's heads, then keys and values of each head.
/// for_rows(fn) calls fn(i) for the caller's rows, copy(to, from, bytes) copies one.
template <typename ForRows, typename Copy>
__device__ __forceinline__ void append_unit(const CacheAppendParams& p, int64_t b, int64_t unit,
                                            ForRows&& for_rows, Copy&& copy) {
  const auto to_pages = [&](const CacheStore& store, int64_t to, int64_t from, int64_t slot) {
    for_rows([&](int64_t i) {
      copy(row_at(store.pages, b, to, slot + i), row_at(store.source, b, from, i), store.row_bytes);
    });
  };
  const int64_t own = unit - p.index_heads;
  if (own < 0) {
    to_pages(p.index, unit, unit, p.index_slot);
    return;
  }
  const CacheStore& store = p.stores[own % p.kStores];
  const int64_t j = own / p.kStores;
  const int64_t head = p.heads.heads[j];
  if (j < p.page_heads) {
    to_pages(store, j, head, p.position);
    return;
  }
  const int64_t first = p.position - (p.start_ptr ? p.start_ptr[b] : 0);
  for_rows([&](int64_t i) {
    const int64_t t = first + i;
    // Only the last `window` rows stay, so that no slot is written twice.
    if (t < 0 || (t >= p.sinks && t < first + p.rows - store.window)) return;
    copy(row_at(store.ring, b, j - p.page_heads, ring_slot(t, p.sinks, store.window)),
         row_at(store.source, b, head, i), store.row_bytes);
  });
}

/// Collects addresses and sizes; the lowest bit that one of them has is the widest vector.
class Alignment {
 public:
  void add(uint64_t bytes) { bits_ |= bytes; }
  void add(const HeadsView& view) {
    bits_ |= reinterpret_cast<uintptr_t>(view.ptr) | static_cast<uint64_t>(view.batch_stride) |
             static_cast<uint64_t>(view.head_stride) | static_cast<uint64_t>(view.row_stride);
  }
  int64_t vector_bytes() const { return static_cast<int64_t>(bits_ & (~bits_ + 1)); }

 private:
  uint64_t bits_ = sizeof(uint4);
};

/// Units of a sequence.
__host__ __device__ inline int64_t append_units(const CacheAppendParams& p) {
  return int64_t{p.heads.count} * p.kStores + p.index_heads;
}

/// The widest vector in bytes that every address allows.
inline int64_t append_vector_bytes(const CacheAppendParams& p) {
  Alignment alignment;
  const auto add = [&](const CacheStore& store, bool pages, bool ring) {
    alignment.add(store.source);
    if (pages) alignment.add(store.pages);
    if (ring) alignment.add(store.ring);
    alignment.add(static_cast<uint64_t>(store.row_bytes));
  };
  for (const CacheStore& store : p.stores) {
    if (p.heads.count > 0) add(store, p.page_heads > 0, p.page_heads < p.heads.count);
  }
  if (p.index_heads > 0) add(p.index, true, false);
  return alignment.vector_bytes();
}

}  // namespace rtpurbo::cuda
