#include "csrc/ops/common/index.h"

#include "csrc/ops/common/check.h"

namespace rtpurbo {

void check_index(const char* op, const at::Tensor& q_index, const at::Tensor& k_index,
                 at::IntArrayRef index_map) {
  check_floating(op, "q_index", q_index);
  check_floating(op, "k_index", k_index);
  check_tensor(op, "q_index", q_index, "[B, R, M, r]",
               {kAnySize, static_cast<int64_t>(index_map.size()), kAnySize, kAnySize});
  check_tensor(op, "k_index", k_index, "[B, Rk, N, r]",
               {q_index.size(0), kAnySize, kAnySize, q_index.size(3)});
  check_device(op, "k_index", k_index, "q_index", q_index);
  TORCH_CHECK_VALUE(q_index.size(3) > 0, "rtpurbo::", op, ": q_index must have an index dim r > 0");
  TORCH_CHECK_VALUE(k_index.size(2) <= INT32_MAX, "rtpurbo::", op,
                    ": k_index must have N <= 2^31 - 1, got ", k_index.size(2));
  for (const int64_t head : index_map) {
    TORCH_CHECK_VALUE(head >= 0 && head < k_index.size(1), "rtpurbo::", op,
                      ": index_map must be heads of k_index in [0, ", k_index.size(1), "), got ",
                      index_map);
  }
}

at::Tensor per_head(const char* op, const char* name, const std::optional<at::Tensor>& values,
                    const at::Tensor& q_index, at::ScalarType dtype) {
  if (!values) return {};
  check_floating(op, name, *values);
  check_tensor(op, name, *values, "[R]", {q_index.size(1)});
  check_device(op, name, *values, "q_index", q_index);
  return values->to(dtype).contiguous();
}

at::Tensor per_row(const char* op, const std::optional<at::Tensor>& near_lse,
                   const at::Tensor& q_index, at::ScalarType dtype) {
  if (!near_lse) return {};
  check_floating(op, "near_lse", *near_lse);
  check_tensor(op, "near_lse", *near_lse, "[B, R, M]",
               {q_index.size(0), q_index.size(1), q_index.size(2)});
  check_device(op, "near_lse", *near_lse, "q_index", q_index);
  return near_lse->to(dtype).contiguous();
}

at::ScalarType accumulation_type(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble
                                                                          : at::kFloat;
}

}  // namespace rtpurbo
