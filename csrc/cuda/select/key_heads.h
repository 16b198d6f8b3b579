#pragma once
// Which heads read the same index keys, so that one scan of the keys may score for all of them.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "csrc/cuda/decode.h"
#include "csrc/cuda/select.h"
#include "csrc/cuda/select/problem.cuh"

namespace rtpurbo::cuda {

/// Groups of heads that read one key head: those of group i are heads[first[i], first[i + 1]).
struct KeyHeads {
  static constexpr int kMaxHeads = DecodeParams::kMaxHeads;
  static constexpr int kMostOfOne = 8;  // columns of a product m16n8k16
  int16_t count = 0;
  int16_t first[kMaxHeads + 1];
  int16_t heads[kMaxHeads];

  KeyHeads() = default;
  explicit KeyHeads(const SelectParams& p) {
    const int heads_count = static_cast<int>(p.heads);
    for (int i = 0; i < heads_count; ++i) heads[i] = static_cast<int16_t>(i);
    const auto key_of = [&](int head) { return p.index_map.heads[head]; };
    std::sort(heads, heads + heads_count,
              [&](int a, int b) { return std::pair(key_of(a), a) < std::pair(key_of(b), b); });
    for (int i = 0; i < heads_count; ++i) {
      if (i == 0 || key_of(heads[i]) != key_of(heads[i - 1]) ||
          i - first[count - 1] == kMostOfOne) {
        first[count++] = static_cast<int16_t>(i);
      }
    }
    first[count] = static_cast<int16_t>(heads_count);
  }
};

/// Warps that may scan a key head together: so many lists a team takes over.
constexpr int kMostLists = 2560;

/// How many blocks scan a key head together for a group of its heads; 0 where each team scans for
/// itself. To share pays where the keys of all heads are many times those of all groups.
inline int shared_scan_blocks(const SelectParams& p, const SelectPlan& plan) {
  if (p.coded > 0 || plan.teams != p.batch * p.heads) return 0;
  const KeyHeads keys(p);
  if (p.heads < 2 * keys.count) return 0;
  const auto blocks = static_cast<int>(plan.blocks / (p.batch * keys.count));
  return std::min(blocks, kMostLists / kSelectWarps);
}

}  // namespace rtpurbo::cuda
