#include "csrc/ops/common/check.h"

#include <string>

namespace rtpurbo {
namespace {

std::string describe(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kAnySize ? "*" : std::to_string(size);
  }
  return text + "]";
}

}  // namespace

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, const char* layout,
                  std::initializer_list<int64_t> sizes) {
  bool matches = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    if (!matches) break;
    matches = size == kAnySize || tensor.size(axis) == size;
    ++axis;
  }
  TORCH_CHECK_VALUE(matches, "rtpurbo::", op, ": ", name, " must have shape ", layout, " = ",
                    describe(sizes), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1,
                    "rtpurbo::", op, ": ", name,
                    " must be contiguous in its last dimension, got strides ", tensor.strides(),
                    "; call .contiguous() on it");
}

void check_device(const char* op, const char* name, const at::Tensor& tensor,
                  const char* reference_name, const at::Tensor& reference) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), "rtpurbo::", op, ": ", name,
                    " must be on the device of ", reference_name, " (", reference.device(),
                    "), got ", tensor.device());
}

void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
      "rtpurbo::", op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", type);
}

void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "rtpurbo::", op, ": ", name, " must have dtype ",
                   dtype, ", got ", tensor.scalar_type());
}

void check_start(const char* op, const std::optional<at::Tensor>& start, const char* reference_name,
                 const at::Tensor& reference, const char* name) {
  if (!start) return;
  check_tensor(op, name, *start, "[B]", {reference.size(0)});
  check_dtype(op, name, *start, at::kLong);
  check_device(op, name, *start, reference_name, reference);
}

void check_pair(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                const char* other_name, const std::optional<at::Tensor>& other) {
  TORCH_CHECK_VALUE(tensor.has_value() == other.has_value(), "rtpurbo::", op, ": ", name, " and ",
                    other_name, " must be given together, got only ", tensor ? name : other_name);
}

void check_heads(const char* op, const char* name, at::IntArrayRef heads, int64_t num_heads) {
  int64_t previous = -1;
  for (const int64_t head : heads) {
    TORCH_CHECK_VALUE(head > previous && head < num_heads, "rtpurbo::", op, ": ", name,
                      " must be ascending head numbers in [0, ", num_heads, "), got ", heads);
    previous = head;
  }
}

}  // namespace rtpurbo
