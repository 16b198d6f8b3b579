#pragma once
// Which keys a tile of query rows sees, as runs of consecutive keys; cost follows their lengths.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// Keys [begin, end) of which row m sees those up to m and, when windowed, those with
/// m - n < window.
struct Run {
  int64_t begin;
  int64_t end;
  bool windowed;

  int64_t first(int64_t m, int64_t window) const {
    return windowed ? std::max(begin, m - window + 1) : begin;
  }
  int64_t last(int64_t m) const { return std::min(end, m + 1); }
};

/// Sinks and window of rows [first, last] of a sequence whose real keys begin at `start`.
inline void near_runs(int64_t first, int64_t last, int64_t start, int64_t window, int64_t sinks,
                      std::vector<Run>& runs) {
  runs.clear();
  const int64_t end = last + 1;
  const int64_t sink_end = std::min(start + sinks, end);
  const int64_t window_begin = std::max({start, sink_end, first - window + 1});
  if (start < sink_end) runs.push_back({start, sink_end, false});
  if (window_begin < end) runs.push_back({window_begin, end, true});
}

/// All visible keys of rows up to `last`.
inline void visible_runs(int64_t last, int64_t start, std::vector<Run>& runs) {
  runs.clear();
  if (start <= last) runs.push_back({start, last + 1, false});
}

/// The visible keys in the listed blocks (ascending) of rows up to `last`.
inline void block_runs(const int32_t* blocks, int64_t count, int64_t block_size, int64_t last,
                       int64_t start, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = std::max(start, blocks[i] * block_size);
    const int64_t end = std::min((blocks[i] + 1) * block_size, last + 1);
    if (begin >= end) continue;
    if (!runs.empty() && runs.back().end == begin) {
      runs.back().end = end;
    } else {
      runs.push_back({begin, end, false});
    }
  }
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
