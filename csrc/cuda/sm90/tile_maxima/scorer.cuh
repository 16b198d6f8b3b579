#pragma once
// A warpgroup: 128 rows as two operands of 64 in turns. Two products are under way at a time: while
// it reduces the scores of one, the tensor cores work on the other and for other warpgroups.

#include <cuda_fp16.h>

#include "csrc/cuda/head_rows.cuh"
#include "csrc/cuda/ptx/wgmma.cuh"
#include "csrc/cuda/ptx/wgmma_half.cuh"
#include "csrc/cuda/select_tiles/quad.cuh"
#include "csrc/cuda/select_tiles/row_parts.cuh"
#include "csrc/cuda/sm90/tile_maxima/key_ring.cuh"

namespace rtpurbo::cuda::sm90::maxima {

using tiles::Log2Sum;

/// Scores of 64 rows and 128 keys, see wgmma_m64n128k16.
using Scores = uint32_t[32];

/// A lane's fp16 maxima of 256 keys, not yet those of its quad: for rows g and g + 8 of its warp's
/// 16, two pairs of blocks each. The keys of two blocks come in turns, see encode_key_map: they are
/// the halves of a register.
struct Maxima {
  uint32_t pairs[4];

  /// Of pair p.
  __device__ __forceinline__ void take(const Scores& d, int p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t largest = d[half];
#pragma unroll
      for (int j = 1; j < 16; ++j) largest = tiles::max_or_nan(largest, d[2 * j + half]);
      pairs[2 * half + p] = largest;
    }
  }

  /// Of row g + 8 (t / 2): of blocks 2 (t % 2) and the next.
  __device__ __forceinline__ uint32_t share_out(int t) const {
    return tiles::share_out(pairs, t,
                            [](uint32_t a, uint32_t b) { return tiles::max_or_nan(a, b); });
  }
};

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

  /// Begins scoring the rows against 128 keys.
  __device__ __forceinline__ void start(Scores& scores, const Rows& rows, const uint8_t* keys) {
    ptx::wgmma_fence();
    ptx::wgmma_m64n128k16(scores, rows.query, ptx::descriptor_of_32_byte_rows(keys));
    ptx::wgmma_commit();
  }

  /// All products but the last kLater ones, one of which is `scores`.
  template <int kLater>
  __device__ __forceinline__ void finish(Scores& scores) {
    ptx::wgmma_wait<kLater>();
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
    Scores first, second;
    Maxima maxima;
    ptx::pin(first);
    ptx::pin(second);
    start(first, rows_[0], keys);
    ring.advance(i);
    start(second, rows_[0], keys + kBoxBytes);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const uint8_t* next = keys + (part + 1) / 2 * kTileBytes;
      finish<1>(first);
      maxima.take(first, 0);
      if (part < 3) {
        start(first, rows_[(part + 1) % 2], next);
        finish<1>(second);
      } else {
        finish<0>(second);
        ring.release(i);
      }
      maxima.take(second, 1);
      if (part < 3) start(second, rows_[(part + 1) % 2], next + kBoxBytes);
      keep(maxima, rows_[part % 2], out + part / 2 * quad_words() + part % 2 * kOperandWords);
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
      Maxima maxima;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        Scores scores;
        start(scores, rows_[0], keys + half * kTileBytes + p * kBoxBytes);
        finish<0>(scores);
        hide(scores, m, key + p * kBoxKeys);
        maxima.take(scores, p);
      }
      keep(maxima, rows_[0], maxima_of(key) + m * kOperandWords);
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
      for (int j = 0; j < 16; ++j) {
        uint32_t& pair = scores[2 * j + h];
        const int low = j * 4, high = low + tiles::kBlock;
        if (low < begin || low >= end) pair = (pair & 0xffff0000u) | kNone;
        if (high < begin || high >= end) pair = (pair & 0xffffu) | kNone << 16;
      }
    }
  }

  /// Keeps the blocks' maxima and adds them up.
  __device__ __forceinline__ void keep(const Maxima& maxima, Rows& rows, uint32_t* out) {
    const uint32_t pair = maxima.share_out(t_);
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
