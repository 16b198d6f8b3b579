// Rows move as bytes, in the widest vectors that every address allows. A block takes one tensor of
// one head: threadIdx.x runs along a row, threadIdx.y and blockIdx.x over the rows.

#include <algorithm>

#include "csrc/cuda/cache.h"

namespace rtpurbo::cuda {
namespace {

constexpr int64_t kThreads = 256;
constexpr int64_t kMaxGridX = 1 << 20;
constexpr int64_t kMaxGridY = 65535;

__device__ char* row_at(const HeadsView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(view.ptr) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

__device__ int64_t ring_slot(int64_t t, int64_t sinks, int64_t window) {
  return t < sinks ? t : sinks + (t - sinks) % window;
}

/// Zeros where `from` is null.
template <typename Vector>
__device__ void copy_row(char* to, const char* from, int64_t bytes) {
#pragma unroll 1  // rows are short
  for (int64_t i = threadIdx.x * sizeof(Vector); i < bytes; i += blockDim.x * sizeof(Vector)) {
    *reinterpret_cast<Vector*>(to + i) =
        from ? *reinterpret_cast<const Vector*>(from + i) : Vector{};
  }
}

template <typename Fn>
__device__ void for_rows(int64_t rows, Fn&& fn) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < rows;
       i += step) {
    fn(i);
  }
}

template <typename Vector>
__global__ __launch_bounds__(kThreads,
                             4) void append_kernel(const __grid_constant__ CacheAppendParams p) {
  const int64_t of_batch = p.heads.count * p.kStores + p.index_heads;
  for (int64_t unit = blockIdx.y; unit < p.batch * of_batch; unit += gridDim.y) {
    const int64_t b = unit / of_batch;
    const int64_t own = unit % of_batch - p.index_heads;
    const auto to_pages = [&](const CacheStore& store, int64_t to, int64_t from, int64_t slot) {
      for_rows(p.rows, [&](int64_t i) {
        copy_row<Vector>(row_at(store.pages, b, to, slot + i), row_at(store.source, b, from, i),
                         store.row_bytes);
      });
    };
    if (own < 0) {
      const int64_t head = own + p.index_heads;
      to_pages(p.index, head, head, p.index_slot);
      continue;
    }
    const CacheStore& store = p.stores[own % p.kStores];
    const int64_t j = own / p.kStores;
    const int64_t head = p.heads.heads[j];
    if (j < p.page_heads) {
      to_pages(store, j, head, p.position);
      continue;
    }
    const int64_t first = p.position - (p.start_ptr ? p.start_ptr[b] : 0);
    for_rows(p.rows, [&](int64_t i) {
      const int64_t t = first + i;
      // Only the last `window` rows stay, so that no slot is written twice.
      if (t < 0 || (t >= p.sinks && t < first + p.rows - store.window)) return;
      copy_row<Vector>(row_at(store.ring, b, j - p.page_heads, ring_slot(t, p.sinks, store.window)),
                       row_at(store.source, b, head, i), store.row_bytes);
    });
  }
}

template <typename Vector>
__global__ __launch_bounds__(kThreads,
                             4) void unroll_kernel(const __grid_constant__ CacheUnrollParams p) {
  const int64_t slots = p.sinks + p.window;
  const int64_t heads = max(p.heads.count, 1);
  for (int64_t unit = blockIdx.y; unit < p.batch * heads; unit += gridDim.y) {
    const int64_t j = unit % heads;
    const int64_t b = unit / heads;
    const int64_t cached = p.position - (p.start_ptr ? p.start_ptr[b] : 0);
    if (j == 0 && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) {
      p.start_local_ptr[b] = slots > cached ? slots - cached : 0;
    }
    if (p.heads.count == 0) continue;
    for_rows(slots + p.rows, [&](int64_t i) {
      const char* from = nullptr;
      if (i >= slots) {
        from = row_at(p.source, b, p.heads.heads[j], i - slots);
      } else {
        const int64_t t = cached > slots && i < p.sinks ? i : cached - slots + i;
        if (t >= 0) from = row_at(p.ring, b, j, ring_slot(t, p.sinks, p.window));
      }
      copy_row<Vector>(row_at(p.target, b, j, i), from, p.row_bytes);
    });
  }
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

/// Calls fn(vector, grid, block).
template <typename Fn>
cudaError_t launch(int64_t vector_bytes, int64_t row_bytes, int64_t rows, int64_t units, Fn&& fn) {
  int64_t along = 1;
  while (along < 32 && along * vector_bytes < row_bytes) along *= 2;
  const int64_t across = std::clamp<int64_t>(rows, 1, kThreads / along);
  const dim3 block(static_cast<unsigned>(along), static_cast<unsigned>(across));
  const dim3 grid(
      static_cast<unsigned>(std::clamp<int64_t>((rows + across - 1) / across, 1, kMaxGridX)),
      static_cast<unsigned>(std::min(units, kMaxGridY)));
  switch (vector_bytes) {
    case 16:
      fn(uint4{}, grid, block);
      break;
    case 8:
      fn(uint2{}, grid, block);
      break;
    case 4:
      fn(uint32_t{}, grid, block);
      break;
    case 2:
      fn(uint16_t{}, grid, block);
      break;
    default:
      fn(uint8_t{}, grid, block);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_cache_append(const CacheAppendParams& p, cudaStream_t stream) {
  const int64_t units = p.batch * (p.heads.count * p.kStores + p.index_heads);
  if (units == 0 || p.rows == 0) return cudaSuccess;
  Alignment alignment;
  int64_t row_bytes = 0;
  const auto add = [&](const CacheStore& store, bool pages, bool ring) {
    alignment.add(store.source);
    if (pages) alignment.add(store.pages);
    if (ring) alignment.add(store.ring);
    alignment.add(static_cast<uint64_t>(store.row_bytes));
    row_bytes = std::max(row_bytes, store.row_bytes);
  };
  for (const CacheStore& store : p.stores) {
    if (p.heads.count > 0) add(store, p.page_heads > 0, p.page_heads < p.heads.count);
  }
  if (p.index_heads > 0) add(p.index, true, false);
  return launch(alignment.vector_bytes(), row_bytes, p.rows, units,
                [&](auto vector, dim3 grid, dim3 block) {
                  append_kernel<decltype(vector)><<<grid, block, 0, stream>>>(p);
                });
}

cudaError_t launch_cache_unroll(const CacheUnrollParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Alignment alignment;
  for (const HeadsView* view : {&p.ring, &p.source, &p.target}) alignment.add(*view);
  alignment.add(static_cast<uint64_t>(p.row_bytes));
  const int64_t rows = p.heads.count > 0 ? p.sinks + p.window + p.rows : 0;
  return launch(alignment.vector_bytes(), p.row_bytes, rows,
                p.batch * std::max<int64_t>(p.heads.count, 1),
                [&](auto vector, dim3 grid, dim3 block) {
                  unroll_kernel<decltype(vector)><<<grid, block, 0, stream>>>(p);
                });
}

}  // namespace rtpurbo::cuda
