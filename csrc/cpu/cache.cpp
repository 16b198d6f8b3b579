#include "csrc/cpu/cache.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;

char* row_at(const HeadsView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(view.ptr) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

int64_t ring_slot(int64_t t, int64_t sinks, int64_t window) {
  return t < sinks ? t : sinks + (t - sinks) % window;
}

int64_t grain(int64_t rows, int64_t row_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, rows * row_bytes));
}

}  // namespace

void cache_append_kernel(const CacheAppendParams& p) {
  const auto append_head = [&](int64_t unit) {
    const int64_t b = unit / p.heads_count;
    const int64_t j = unit % p.heads_count;
    const int64_t start = p.start_ptr ? p.start_ptr[b] : 0;
    const bool pages = p.slot_window < 0;
    const int64_t end = p.position + p.rows - start;  // in positions counted from start
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t t = p.position + i - start;
      if (!pages && (t < 0 || (t >= p.sinks && t < end - p.slot_window))) continue;
      const int64_t slot = pages ? p.position + i : ring_slot(t, p.sinks, p.slot_window);
      std::memcpy(row_at(p.target, b, j, slot), row_at(p.source, b, p.heads[j], i), p.row_bytes);
    }
  };
  at::parallel_for(0, p.batch * p.heads_count, grain(p.rows, p.row_bytes),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t unit = begin; unit < end; ++unit) append_head(unit);
                   });
}

void cache_unroll_kernel(const CacheUnrollParams& p) {
  const int64_t slots = p.sinks + p.window;
  const auto cached = [&](int64_t b) { return p.position - (p.start_ptr ? p.start_ptr[b] : 0); };
  for (int64_t b = 0; b < p.batch; ++b) {
    p.start_local_ptr[b] = std::max<int64_t>(0, slots - cached(b));
  }
  const auto unroll_head = [&](int64_t unit) {
    const int64_t b = unit / p.heads_count;
    const int64_t j = unit % p.heads_count;
    const int64_t t = cached(b);
    for (int64_t i = 0; i < slots; ++i) {
      char* row = row_at(p.target, b, j, i);
      const int64_t token = t > slots && i < p.sinks ? i : t - slots + i;
      if (token < 0) {
        std::memset(row, 0, p.row_bytes);
      } else {
        std::memcpy(row, row_at(p.ring, b, j, ring_slot(token, p.sinks, p.window)), p.row_bytes);
      }
    }
    for (int64_t i = 0; i < p.rows; ++i) {
      std::memcpy(row_at(p.target, b, j, slots + i), row_at(p.source, b, p.heads[j], i),
                  p.row_bytes);
    }
  };
  at::parallel_for(0, p.batch * p.heads_count, grain(slots + p.rows, p.row_bytes),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t unit = begin; unit < end; ++unit) unroll_head(unit);
                   });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
