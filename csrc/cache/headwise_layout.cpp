#include "headwise_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace rtpurbo {
namespace {

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

void HeadwiseLayout::reset() { length_ = page_capacity_ = ring_capacity_ = 0; }

int64_t HeadwiseLayout::kv_bytes(int64_t batch, int64_t itemsize) const {
  const auto full = static_cast<int64_t>(shape_.full_heads.size());
  const auto local = static_cast<int64_t>(local_heads_.size());
  return 2 * batch * itemsize * shape_.head_dim * (full * page_capacity_ + local * ring_capacity_);
}

int64_t HeadwiseLayout::index_bytes(int64_t batch, int64_t itemsize) const {
  return batch * itemsize * shape_.index_heads * shape_.index_dim * page_capacity_;
}

int64_t HeadwiseLayout::dense_bytes(int64_t batch, int64_t itemsize) const {
  return 2 * batch * itemsize * shape_.head_dim * shape_.kv_heads * length_;
}

}  // namespace rtpurbo
