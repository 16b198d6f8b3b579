// Rows move in the widest vectors that every address allows. A block takes one tensor of one head:
// threadIdx.x runs along a row, threadIdx.y and blockIdx.x over the rows.

#include <algorithm>

#include "csrc/cuda/cache.h"
#include "csrc/cuda/cache_rows.cuh"

namespace rtpurbo::cuda {
namespace {

constexpr int64_t kThreads = 256;
constexpr int64_t kMaxGridX = 1 << 20;
constexpr int64_t kMaxGridY = 65535;

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
  const int64_t units = append_units(p);
  for (int64_t unit = blockIdx.y; unit < p.batch * units; unit += gridDim.y) {
    append_unit(
        p, unit / units, unit % units, [&](auto&& fn) { for_rows(p.rows, fn); },
        [](char* to, const char* from, int64_t bytes) {
          copy_row<Vector>(to, from, bytes, threadIdx.x, blockDim.x);
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
      copy_row<Vector>(row_at(p.target, b, j, i), from, p.row_bytes, threadIdx.x, blockDim.x);
    });
  }
}

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
  const int64_t units = p.batch * append_units(p);
  if (units == 0 || p.rows == 0) return cudaSuccess;
  int64_t row_bytes = p.index.row_bytes;
  for (const CacheStore& store : p.stores) row_bytes = std::max(row_bytes, store.row_bytes);
  return launch(append_vector_bytes(p), row_bytes, p.rows, units,
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
