#pragma once
// Checks that the operators on index queries and index keys share.

#include <ATen/core/Tensor.h>

#include <optional>

namespace rtpurbo {

/// Checks q_index [B, R, M, r] and k_index [B, Rk, N, r], floating and on one device, and that
/// index_map gives a head of k_index for each of the R queries.
void check_index(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                 at::IntArrayRef index_map);

/// Checks a floating [R] tensor, and returns it contiguous as `dtype`; undefined when absent.
at::Tensor per_head(const char* op, const char* name, const std::optional<at::Tensor>& values,
                    const at::Tensor& q_index, at::ScalarType dtype);

/// Checks near_lse [B, R, M], and returns it contiguous as `dtype`; undefined when absent.
at::Tensor per_row(const char* op, const std::optional<at::Tensor>& near_lse,
                   const at::Tensor& q_index, at::ScalarType dtype);

/// The data of a tensor that may be undefined.
inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

/// Float64 when one of the two is, otherwise float32.
at::ScalarType accumulation_type(const at::Tensor& a, const at::Tensor& b);

}  // namespace rtpurbo
