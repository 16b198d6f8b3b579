#pragma once
// One selection problem is one query row: its members are keys, or blocks of keys, with a score
// each. A team of blocks works on it; every block keeps the scores of its own members from the
// first stage to the last. A stage runs once or a few times: its code is kept small, because to
// fetch it costs more than to run it.

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/cuda/element.cuh"
#include "csrc/cuda/select.h"
#include "csrc/cuda/select/ordered_key.cuh"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / 32;

/// Keys that a warp scores at a time; the largest block of keys that can be a member.
constexpr int kGroupKeys = 64;

/// log2 of the groups that follow each other in a warp, where such runs are dealt out evenly: the
/// memory gives a run quicker than groups far apart.
constexpr int kLongRun = 2;

/// Scans of a selection with a sieve, at most: of a sample, of the rest, of all.
constexpr int kSiftedHistograms = 3;

/// A bin spans 2^(1/32) in weight below the row's largest score; the last one holds all the rest.
constexpr int kBins = 1024;
constexpr float kBinsPerOctave = 32.0f;

/// What a block of a team saw of its members' scores.
struct BlockStats {
  uint32_t top_key;    // ordered key of the largest score that is no NaN, 0 for none
  uint32_t poisoned;   // a NaN or +inf score
  int32_t candidates;  // members with a score above -inf
  float rest_shift;    // mass of keys that are no members: exp(shift) * sum. In form `full` that of
  float rest_sum;      // the near keys, with a sieve that of what was dropped
};

/// A member whose bin is cut.
struct Member {
  uint32_t key;
  int32_t position;
};

/// Pointers into the workspace.
struct SelectWorkspace {
  uint32_t* arrivals;            // [teams], of Team::sync
  BlockStats* stats;             // [teams * team_size]
  unsigned long long* bin_mass;  // [teams, kBins], with `refine` 2, with a sieve 3 of them
  uint32_t* bin_count;           // the same
  Member* cut_members;           // [teams * team_size, block_members]
  int32_t* cut_counts;           // [teams * team_size]
  float* scores;  // [teams * team_size, block_members], twice with a sieve; null: in shared memory
  uint64_t* selected;      // [teams, groups]: bit i of word j is key 64 j + i; select only
  uint32_t* chunk_counts;  // [teams, chunks], select only
  // Of scans for all heads of a key head:
  float2* edges;             // [teams]: the sieve's, and to which masses are relative
  int32_t* list_counts;      // [teams, shared_blocks * kSelectWarps]
  BlockStats* shared_stats;  // [teams, shared_blocks]
  int32_t shared_blocks;     // that scan a key head together, 0 for none
  int32_t teams, team_size;
  int32_t run_shift;      // log2 of the groups that follow each other in a warp
  int32_t warp_groups;    // that a warp has room for
  int32_t block_members;  // that a block has room for
  int32_t shared_bytes;   // of dynamic shared memory of a block
  int64_t groups;         // words of a problem's mask
  int64_t chunks;
};

/// The score that an ordered key was made of.
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// How many bins a score lies below the largest one.
__device__ __forceinline__ float bins_below(float top, float score) {
  constexpr float kBinsPerNat = kLog2E * kBinsPerOctave;
  return (top - score) * kBinsPerNat;
}

/// A bin by its number, and that number as a float. Made by an addition that rounds down:
/// conversions have few units.
struct Bin {
  int number;
  float start;

  /// For below >= 0.
  __device__ __forceinline__ explicit Bin(float below) {
    constexpr float kUnitsAreOnes = 1 << 23;
    const float sum = __fadd_rz(fminf(below, kBins - 1.0f), kUnitsAreOnes);
    number = __float_as_int(sum) - __float_as_int(kUnitsAreOnes);
    start = sum - kUnitsAreOnes;
  }
};

/// All scores of a bin lie in it, and few others: two comparisons spare most members the rest.
struct BinRange {
  float low, high;

  __device__ BinRange(float top, int bin) {
    constexpr float kNatsPerBin = 1.0f / (kLog2E * kBinsPerOctave);
    constexpr float kRounding = 0x1p-20f;  // times what is subtracted: more than is lost
    const float begin = static_cast<float>(bin) * kNatsPerBin, end = begin + kNatsPerBin;
    const float margin = (end + fabsf(top)) * kRounding;
    low = bin == kBins - 1 ? -INFINITY : top - end - margin;
    high = top - begin + margin;
  }

  __device__ bool holds(float score) const { return score >= low && score <= high; }
};

/// Weight relative to the upper edge of the bin, in (2^-1/32, 1]; less in the last bin.
__device__ __forceinline__ float weight_in_bin(float below, float bin) {
  return fast_exp2((bin - below) * (1.0f / kBinsPerOctave));
}

/// Weight of a bin's upper edge relative to the largest score.
__device__ __forceinline__ double bin_edge(int bin) {
  return exp2f(-static_cast<float>(bin) / kBinsPerOctave);
}

/// Far keys [far_begin, far_end) of a row: behind the sinks, before the window.
struct Row {
  int64_t batch, head, row;
  int64_t start, position;
  int64_t far_begin, far_end;
};

__device__ __forceinline__ Row row_of(const SelectParams& p, int64_t problem) {
  Row r;
  // 32-bit divisions, which problems of one launch fit.
  const auto number = static_cast<uint32_t>(problem), rows = static_cast<uint32_t>(p.rows);
  const uint32_t head_number = number / rows;
  r.row = number - head_number * rows;
  r.batch = head_number / static_cast<uint32_t>(p.heads);
  r.head = head_number - static_cast<uint32_t>(r.batch) * static_cast<uint32_t>(p.heads);
  r.start = p.start_ptr ? min(max(p.start_ptr[r.batch], int64_t{0}), p.keys) : 0;
  r.position = p.keys - p.rows + r.row;
  if (r.position < r.start) {
    r.far_begin = r.far_end = r.start;
  } else {
    r.far_begin = min(r.start + p.sinks, r.position + 1);
    r.far_end = max(r.far_begin, r.position - p.window + 1);
  }
  return r;
}

/// Dimension d of a row's query, with the scale of the scores.
__device__ __forceinline__ float scaled_query(const SelectParams& p, const Row& row, int d) {
  const int64_t offset = row.batch * p.q_index.batch_stride + row.head * p.q_index.head_stride +
                         row.row * p.q_index.row_stride;
  const float scale = rsqrtf(static_cast<float>(p.dim));
  return scale * load_as_float(p.q_type, p.q_index.ptr, offset + d);
}

}  // namespace rtpurbo::cuda
