#pragma once
// What the operators on the headwise cache check and hand to their kernels.

#include <ATen/core/Tensor.h>

#include <optional>

#include "csrc/ops/common/heads_view.h"
#ifdef RTPURBO_WITH_CUDA
#include "csrc/cuda/cache.h"
#endif

namespace rtpurbo {

/// Strides in bytes.
HeadsView bytes_view(const at::Tensor& tensor);

/// As an index slot: that of the position.
inline constexpr int64_t kAtPosition = -1;

inline int64_t slot_of(int64_t index_slot, int64_t position) {
  return index_slot == kAtPosition ? position : index_slot;
}

void check_position(const char* op, int64_t position, int64_t rows, int64_t sinks);

/// Checks one cache tensor [B, heads, slots, D] that takes rows of `source`.
void check_store(const char* op, const char* name, const at::Tensor& store,
                 const at::Tensor& source, int64_t heads);

/// Checks that there are slots for `rows` tokens from `slot` on.
void check_capacity(const char* op, const char* name, const at::Tensor& pages, int64_t slot,
                    int64_t rows);

void check_ring(const char* op, const char* name, const at::Tensor& ring, int64_t sinks);

/// Keys and values that go to rings and pages.
struct AppendArguments {
  const at::Tensor &k, &v;
  at::Tensor &k_ring, &v_ring, &k_pages, &v_pages;
  at::IntArrayRef full_heads;
  int64_t position, sinks;
  const std::optional<at::Tensor>& start;
};

void check_append(const char* op, const AppendArguments& a);

void append_on_cpu(const AppendArguments& a);

/// Rows of every head of `source` to the slots from `slot` on.
void append_to_pages_on_cpu(const at::Tensor& source, const at::Tensor& pages, int64_t slot);

#ifdef RTPURBO_WITH_CUDA
/// Kernel parameters; `start_kept` keeps what they point into.
cuda::CacheAppendParams append_params(const char* op, const AppendArguments& a,
                                      at::Tensor& start_kept);
#endif

}  // namespace rtpurbo
