#include "headwise_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "csrc/ops/common/index_block.h"

namespace rtpurbo {
namespace {

constexpr int64_t kHalfBytes = 2;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("rtpurbo::HeadwiseLayout: " + message);
}

int64_t grown(int64_t capacity, int64_t needed) {
  if (needed <= capacity) return capacity;
  const int64_t target = std::max(needed, capacity + capacity / HeadwiseLayout::kGrowthDivisor);
  return (target + HeadwiseLayout::kPageTokens - 1) / HeadwiseLayout::kPageTokens *
         HeadwiseLayout::kPageTokens;
}

}  // namespace

HeadwiseLayout::HeadwiseLayout(HeadwiseShape shape) : shape_(std::move(shape)) {
  require(shape_.kv_heads >= 1 && shape_.head_dim >= 1, "kv_heads and head_dim must be >= 1");
  require(shape_.window >= 1 && shape_.sinks >= 0, "window must be >= 1 and sinks >= 0");
  require(shape_.index_heads >= 0 && shape_.index_dim >= 0,
          "index_heads and index_dim must be >= 0");
  require(shape_.index_bits == 4 || shape_.index_bits == 8 || shape_.index_bits == 16,
          "index_bits must be 4, 8 or 16");
  require(shape_.index_window >= 1, "index_window must be >= 1");
  require(!shape_.index_refine || shape_.index_bits < 16,
          "index_refine must be false with index_bits 16");
  int64_t previous = -1;
  for (const int64_t head : shape_.full_heads) {
    require(head > previous && head < shape_.kv_heads,
            "full_heads must be ascending and below kv_heads");
    previous = head;
  }
  for (int64_t head = 0; head < shape_.kv_heads; ++head) {
    if (!std::binary_search(shape_.full_heads.begin(), shape_.full_heads.end(), head)) {
      local_heads_.push_back(head);
    }
  }
}

bool HeadwiseLayout::reserve(int64_t tokens) {
  require(tokens >= 0, "tokens must be >= 0");
  const int64_t needed = length_ + tokens;
  const int64_t pages = grown(page_capacity_, needed);
  const int64_t ring = std::min(grown(ring_capacity_, std::max(needed, shape_.sinks + 1)),
                                shape_.sinks + shape_.window);
  const bool changed = pages != page_capacity_ || ring != ring_capacity_;
  page_capacity_ = pages;
  ring_capacity_ = ring;
  return changed;
}

void HeadwiseLayout::advance(int64_t tokens) {
  if (tokens < 0 || length_ + tokens > page_capacity_) {
    throw std::out_of_range("rtpurbo::HeadwiseLayout: advance must stay within the reserved " +
                            std::to_string(page_capacity_) + " tokens; call reserve first");
  }
  length_ += tokens;
}

int64_t HeadwiseLayout::tail_capacity() const {
  // One token more than settle() leaves at most.
  return std::min(page_capacity_, grown(0, shape_.index_window + kIndexBlock - 1));
}

int64_t HeadwiseLayout::settle() {
  if (shape_.index_bits == 16) return 0;
  const int64_t far = std::max<int64_t>(0, length_ - shape_.index_window + 1);
  const int64_t joined = far / kIndexBlock * kIndexBlock - coded_;
  coded_ += joined;
  code_capacity_ = grown(code_capacity_, coded_);
  return joined;
}

void HeadwiseLayout::reset() {
  length_ = page_capacity_ = ring_capacity_ = coded_ = code_capacity_ = 0;
}

int64_t HeadwiseLayout::kv_bytes(int64_t batch, int64_t itemsize) const {
  const auto full = static_cast<int64_t>(shape_.full_heads.size());
  const auto local = static_cast<int64_t>(local_heads_.size());
  return 2 * batch * itemsize * shape_.head_dim * (full * page_capacity_ + local * ring_capacity_);
}

int64_t HeadwiseLayout::index_bytes(int64_t batch) const {
  const int64_t heads = batch * shape_.index_heads;
  const int64_t dim = shape_.index_dim;
  if (shape_.index_bits == 16) return heads * kHalfBytes * dim * page_capacity_;
  const int64_t ranges = kHalfBytes * 2 * dim * (code_capacity_ / kIndexBlock);
  return heads * (kHalfBytes * dim * (shape_.index_refine ? page_capacity_ : tail_capacity()) +
                  code_bytes(dim, shape_.index_bits) * code_capacity_ + ranges);
}

int64_t HeadwiseLayout::dense_bytes(int64_t batch, int64_t itemsize) const {
  return 2 * batch * itemsize * shape_.head_dim * shape_.kv_heads * length_;
}

}  // namespace rtpurbo
