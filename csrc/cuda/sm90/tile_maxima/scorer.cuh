#pragma once
// A warpgroup: 128 rows as two operands of 64 in turns. It has one set of accumulators; while it
// reduces them, the tensor cores work for the other warpgroups.

#include <cuda_fp16.h>

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/wgmma.cuh"
#include "csrc/cuda/ptx/wgmma_half.cuh"
#include "csrc/cuda/select_tiles/quad.cuh"
#include "csrc/cuda/select_tiles/row_parts.cuh"
#include "csrc/cuda/sm90/tile_maxima/key_ring.cuh"

namespace rtpurbo::cuda::sm90::maxima {

using tiles::Log2Sum;

/// Scores of 64 rows and 256 keys, see wgmma_m64n256k16.
using Scores = uint32_t[64];

/// A lane's two fp16 maxima for its row, g + 8 (t / 2) of its warp's 16: of blocks 2 (t % 2) and
/// the next of the 256 keys. The keys of two blocks come in turns, see encode_key_map: they are the
/// halves of a register.
__device__ __forceinline__ uint32_t block_maxima(const Scores& d, int t) {
  uint32_t pairs[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const auto at = [&](int j) { return d[2 * (16 * p + j) + half]; };
      uint32_t largest = at(0);
#pragma unroll
      for (int j = 1; j < 16; ++j) largest = tiles::max_or_nan(largest, at(j));
      pairs[2 * half + p] = largest;
    }
  }
  return tiles::share_out(pairs, t, [](uint32_t a, uint32_t b) { return tiles::max_or_nan(a, b); });
}

/// A lane's share of 64 rows.
struct Rows {
  uint32_t query[4];  // operand of wgmma
  float top, sum;     // as in Log2Sum, of every other pair of blocks

  /// Adds a pair of maxima.
  __device__ __forceinline__ void add(uint32_t pair) {
    const float2 maxima = __half22float2(reinterpret_cast<const __half2&>(pair));
    const float x = maxima.x * tiles::kLog2OfDot, y = maxima.y * tiles::kLog2OfDot;
    const float larger = fmaxf(fmaxf(x, y), top);
    sum = sum * fast_exp2(top - larger) + (fast_exp2(x - larger) + fast_exp2(y - larger));
    top = larger;
  }
};

/// Below any score, and finite: differences from it are never NaN.
constexpr float kLowest = -1e30f;

class Scorer {
 public:
  __device__ Scorer(const SelectTilesParams& p, const Workspace& w, const Group& group)
      : p_(p),
        w_(w),
        group_(group),
        far_(group.far()),
        warp_(threadIdx.x / 32 % 4),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4) {
    load_queries();
  }

  __device__ __forceinline__ void run(KeyRing& ring, const Range& stages) {
    // Stages of which all rows see all keys as far.
    const int begin = (far_.begin + kStageKeys - 1) / kStageKeys;
    const int end = min(group_.common_end() / kStageKeys, stages.end);
    const int64_t stage_words = kStageKeys / kTileKeys * quad_words();
    int stage = stages.begin;
    unsigned i = 0;
    while (stage < stages.end) {
      if (stage < begin || stage >= end) {
        mixed_stage(ring, i++, stage++ * kStageKeys);
        continue;
      }
      uint32_t* out = maxima_of(stage * kStageKeys);
#pragma unroll 1
      for (; stage < end; ++stage, out += stage_words) whole_stage(ring, i++, out);
    }
  }

  /// The rows' sums over the chunk.
  __device__ __forceinline__ void store_sums(int chunk) const {
    if (far_.end <= far_.begin) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Log2Sum sum{rows_[m].top, rows_[m].sum};
      sum.add({__shfl_xor_sync(tiles::kAll, sum.top, 1), __shfl_xor_sync(tiles::kAll, sum.sum, 1)});
      if (t_ % 2) continue;
      tiles::store(w_.far + w_.part(group_.slot, chunk, own_row(m)), sum);
    }
  }

 private:
  static constexpr int kOperandWords = 64 * 2;  // from the rows of one operand to the next

  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      rows_[m] = {{}, kLowest, 0.0f};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = m * 64 + warp_ * 16 + g_ + i % 2 * 8;
        if (group_.empty() || !group_.tile.has(row)) continue;
        const __half* queries =
            head_rows<const __half>(p_.q_index, group_.tile.batch, group_.tile.head) +
            (group_.tile.number * kRows + row) * p_.q_index.row_stride;
        rows_[m].query[i] = __ldg(reinterpret_cast<const uint32_t*>(queries) + t_ + i / 2 * 4);
      }
    }
  }

  /// Begins scoring the rows against 256 keys.
  __device__ __forceinline__ void start(Scores& scores, const Rows& rows, const uint8_t* keys) {
    ptx::wgmma_fence();
    ptx::wgmma_m64n256k16(scores, rows.query, ptx::descriptor_of_32_byte_rows(keys));
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void finish(Scores& scores) {
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
  }

  /// Words from one quad of blocks to the next.
  __device__ __forceinline__ int64_t quad_words() const { return 2 * w_.height; }

  /// Where this lane keeps its maxima of the 256 keys at `key` for operand 0.
  __device__ __forceinline__ uint32_t* maxima_of(int key) const {
    uint2& quad = w_.quad(group_.empty() ? 0 : group_.slot, key / kTileKeys, own_row(0));
    return reinterpret_cast<uint32_t*>(&quad) + t_ % 2;
  }

  /// Stage i of the ring, of which all rows see all keys as far; `out` is that of its first key.
  __device__ __forceinline__ void whole_stage(KeyRing& ring, unsigned i, uint32_t* out) {
    const uint8_t* keys = ring.acquire(i);
    Scores scores;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int half = part / 2, m = part % 2;
      start(scores, rows_[m], keys + half * kTileBytes);
      if (part == 0) ring.advance(i);
      finish(scores);
      if (part == 3) ring.release(i);
      take(scores, rows_[m], out + half * quad_words() + m * kOperandWords);
    }
  }

  __device__ __forceinline__ void mixed_stage(KeyRing& ring, unsigned i, int first_key) {
    const uint8_t* keys = ring.acquire(i);
    ring.advance(i);
#pragma unroll 1
    for (int part = 0; part < 4; ++part) {
      const int half = part / 2, m = part % 2;
      const int key = first_key + half * kTileKeys;
      if (key >= far_.end || key + kTileKeys <= far_.begin) continue;
      Scores scores;
      start(scores, rows_[0], keys + half * kTileBytes);
      finish(scores);
      hide(scores, m, key);
      take(scores, rows_[0], maxima_of(key) + m * kOperandWords);
      // Twice in turns: a loop whose body has one operand is half as long.
      const Rows other = rows_[0];
      rows_[0] = rows_[1];
      rows_[1] = other;
    }
    ring.release(i);
  }

  /// -inf for the keys that a row does not see as far.
  __device__ __forceinline__ void hide(Scores& scores, int m, int key) const {
    constexpr uint32_t kNone = 0xfc00;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 64 + warp_ * 16 + g_ + 8 * h;
      const bool valid = group_.tile.has(row);
      const int begin = group_.tile.far_begin - key - t_;
      const int end = valid ? group_.tile.far_end(row) - key - t_ : INT32_MIN;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        uint32_t& pair = scores[2 * j + h];
        const int low = j / 16 * 2 * tiles::kBlock + j % 16 * 4, high = low + tiles::kBlock;
        if (low < begin || low >= end) pair = (pair & 0xffff0000u) | kNone;
        if (high < begin || high >= end) pair = (pair & 0xffffu) | kNone << 16;
      }
    }
  }

  /// Keeps the blocks' maxima and adds them up.
  __device__ __forceinline__ void take(const Scores& scores, Rows& rows, uint32_t* out) {
    const uint32_t pair = block_maxima(scores, t_);
    *out = pair;
    rows.add(pair);
  }

  __device__ __forceinline__ int own_row(int m) const {
    return m * 64 + warp_ * 16 + g_ + 8 * (t_ / 2);
  }

  const SelectTilesParams& p_;
  const Workspace& w_;
  const Group& group_;
  const Range far_;
  const int warp_, g_, t_;
  Rows rows_[2];
};

}  // namespace rtpurbo::cuda::sm90::maxima
