#pragma once
// Argument checks that say the operator, the argument, what was expected and what came.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace rtpurbo {

/// A dimension of this value may have any size.
inline constexpr int64_t kAnySize = -1;

/// Checks the number of dimensions, each size that is not kAnySize, and that the last dimension is
/// contiguous. `layout` names the axes, as in "[B, Hk, N, D]".
void check_tensor(const char* op, const char* name, const at::Tensor& tensor, const char* layout,
                  std::initializer_list<int64_t> sizes);

/// Checks that `tensor` is on `reference`'s device.
void check_device(const char* op, const char* name, const at::Tensor& tensor,
                  const char* reference_name, const at::Tensor& reference);

/// Checks that the dtype is one of float32, float64, bfloat16, float16.
void check_floating(const char* op, const char* name, const at::Tensor& tensor);

/// Checks that the dtype is exactly `dtype`.
void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype);

/// Checks `start` (or what `name` says), when it is given: int64 [B], with `reference`'s first size
/// and device.
void check_start(const char* op, const std::optional<at::Tensor>& start, const char* reference_name,
                 const at::Tensor& reference, const char* name = "start");

/// Checks that both tensors are given, or neither.
void check_pair(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                const char* other_name, const std::optional<at::Tensor>& other);

/// Checks that the head numbers are strictly ascending and inside [0, num_heads).
void check_heads(const char* op, const char* name, at::IntArrayRef heads, int64_t num_heads);

}  // namespace rtpurbo
