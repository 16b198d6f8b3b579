#pragma once
// One selection problem is one query row: its members are keys, or blocks of keys, with a score
// each. A launch works on a run of problems, so that the workspace stays bounded.

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/cuda/ordered_key.cuh"
#include "csrc/cuda/select.h"
#include "csrc/cuda/softmax.cuh"

namespace rtpurbo::cuda {

/// A bin spans 2^(1/16) in weight below the row's largest score; the last one holds all the rest.
constexpr int kBins = 2048;
constexpr float kBinsPerOctave = 16.0f;

/// Masses in a bin are relative to the bin's upper edge, in units of 2^-17: 32 bits hold those of
/// kBinKeys members.
constexpr int kBinFraction = 17;
constexpr int kBinKeys = 32764;

constexpr int kScanKeys = 2048;  // keys that a block scores
constexpr int kChunk = 4096;     // members that a block collects or emits

/// What the stages find out about a problem; zeroed before the first.
struct Problem {
  // scan
  uint32_t top_key;    // ordered key of the largest score
  uint32_t poisoned;   // a NaN or +inf score or near mass
  int32_t candidates;  // members with a score above -inf
  // cut
  int32_t cut_bin;     // members of lower bins are in, of this one those down to the cut
  int32_t floor_left;  // members of cut_bin that the floor still asks for
  double total;        // all mass, relative to the largest score
  double mass_above;   // of near keys and of members in lower bins
  double target;
  // collect
  uint32_t collected;  // members of cut_bin in the list
  // finish
  uint32_t cut_key;   // members of cut_bin with a larger ordered key are in
  int32_t cut_index;  // and those with this key up to this position
  int32_t count;
};

/// cut_bin when no member, or every member, is in.
constexpr int kNoBin = -1;
constexpr int kAllBins = kBins;

/// Pointers into the workspace, for the problems [first, first + count).
struct Workspace {
  Problem* problems;             // [count]
  unsigned long long* bin_mass;  // [count, kBins]
  uint32_t* bin_count;           // [count, kBins]
  float* scores;                 // [count, members]
  float2* near;                  // [count, scan_chunks], mass of near keys' scores in form `full`
  int32_t* list;                 // [count, members]
  int32_t* chunk_counts;         // [count, chunks], then their prefix sums
  int64_t first, count;
  int64_t members;              // of a problem, rounded up to 4
  int64_t scan_chunks, chunks;  // of kScanKeys keys, of kChunk members
};

/// The scores of four members from a multiple of four on.
__device__ __forceinline__ float4 four_scores(const float* scores, int64_t i, int64_t members) {
  constexpr float kNone = -INFINITY;
  return i < members ? *reinterpret_cast<const float4*>(scores + i)
                     : make_float4(kNone, kNone, kNone, kNone);
}

__device__ __forceinline__ float element(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/// The score that an ordered key was made of.
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// Octaves that a score lies below the largest.
__device__ __forceinline__ float octaves_below(float top, float score) {
  return (top - score) * kLog2E;
}

__device__ __forceinline__ int bin_of(float octaves) {
  return static_cast<int>(fminf(octaves * kBinsPerOctave, kBins - 1.0f));
}

/// Weight relative to the upper edge of the bin, in (2^-1/16, 1]; less in the last bin.
__device__ __forceinline__ float weight_in_bin(float octaves, int bin) {
  return exp2f(static_cast<float>(bin) / kBinsPerOctave - octaves);
}

/// Far keys [begin, end) of a row: behind the sinks, before the window.
struct Row {
  int64_t batch, head, row;
  int64_t start, position;
  int64_t far_begin, far_end;
};

__device__ __forceinline__ Row row_of(const SelectParams& p, int64_t problem) {
  Row r;
  r.row = problem % p.rows;
  r.head = problem / p.rows % p.heads;
  r.batch = problem / p.rows / p.heads;
  r.start = p.start_ptr ? max(p.start_ptr[r.batch], static_cast<int64_t>(0)) : 0;
  r.position = p.keys - p.rows + r.row;
  if (r.position < r.start) {
    r.far_begin = r.far_end = r.start;
  } else {
    r.far_begin = min(r.start + p.sinks, r.position + 1);
    r.far_end = max(r.far_begin, r.position - p.window + 1);
  }
  return r;
}

}  // namespace rtpurbo::cuda
