// The bookkeeping of one layer's headwise KV cache: which KV heads are kept whole, how many tokens
// are in, how much room the tensors need, what they weigh. No tensor is touched here.
#pragma once

#include <cstdint>
#include <vector>

namespace rtpurbo {

struct HeadwiseShape {
  int64_t kv_heads;
  std::vector<int64_t> full_heads;  // ascending: KV heads that hold a retrieval head
  int64_t window;
  int64_t sinks;
  int64_t head_dim;
  int64_t index_heads;
  int64_t index_dim;
  int64_t index_bits = 16;
  int64_t index_window = 1;  // latest keys that every row attends anyway
  bool index_refine = false;
};

// KV heads in `full_heads` keep every token in pages, slot = position. The others keep sinks and
// window in a ring, slot t for t < sinks + window and sinks + (t - sinks) % window afterwards,
// t counted from the sequence's first real token. Both grow with the text, by pages of kPageTokens
// and at least 1/kGrowthDivisor at once, so that slack stays small and copying stays linear.
//
// Index keys of 16 bits lie in pages. Of fewer bits, those that have left index_window for every
// later row are codes, in whole blocks of kIndexBlock; the others are a tail of 16-bit keys. With
// index_refine pages hold all keys in 16 bits beside the codes, and there is no tail.
class HeadwiseLayout {
 public:
  static constexpr int64_t kPageTokens = 64;
  static constexpr int64_t kGrowthDivisor = 64;

  // Throws std::invalid_argument on sizes that make no layout.
  explicit HeadwiseLayout(HeadwiseShape shape);

  const std::vector<int64_t>& full_heads() const { return shape_.full_heads; }
  const std::vector<int64_t>& local_heads() const { return local_heads_; }
  int64_t length() const { return length_; }
  int64_t page_capacity() const { return page_capacity_; }
  int64_t ring_capacity() const { return ring_capacity_; }

  // Makes room for `tokens` more. True if a capacity changed and the tensors must grow with it.
  bool reserve(int64_t tokens);
  // Tokens whose index keys are codes, and the room for codes and tail.
  int64_t coded() const { return coded_; }
  int64_t code_capacity() const { return code_capacity_; }
  int64_t tail_capacity() const;

  // Counts `tokens` that were stored. Throws std::out_of_range beyond the reserved room.
  void advance(int64_t tokens);
  // Counts as codes all that may be; returns how many tokens joined.
  int64_t settle();
  void reset();

  // Bytes of the allocated keys and values, of the settled index keys, and of a dense cache of this
  // length.
  int64_t kv_bytes(int64_t batch, int64_t itemsize) const;
  int64_t index_bytes(int64_t batch) const;
  int64_t dense_bytes(int64_t batch, int64_t itemsize) const;

 private:
  HeadwiseShape shape_;
  std::vector<int64_t> local_heads_;
  int64_t length_ = 0;
  int64_t page_capacity_ = 0;
  int64_t ring_capacity_ = 0;
  int64_t coded_ = 0;
  int64_t code_capacity_ = 0;
};

}  // namespace rtpurbo
