#pragma once
// Tiles of keys and values in shared memory, and how a warp brings them there.

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/evict_first.cuh"
#include "csrc/cuda/ptx/mad_wide.cuh"

namespace rtpurbo::cuda {

/// kStages: tiles of a warp that shared memory holds, of kKeys each.
template <int kDim, int kWarps, int kStages, int kKeys = kProductKeys>
struct MmaTile {
  static constexpr int kRows = kKeys, kProducts = kKeys / kProductKeys;
  static constexpr int kRowChunks = kDim / 8;  // of 16 bytes
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kQueryBytes = DecodeSet::kMaxHeads * kRowBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kQueryBytes + kWarps * kWarpBytes;
  static constexpr int kSumStride = kDim + 4;  // writes are free of bank conflicts
  static_assert(kWarpBytes >= DecodeSet::kMaxHeads * kSumStride * 4, "holds the sums at the end");

  /// Where chunk c of a row is; the swizzle keeps ldmatrix free of bank conflicts.
  __device__ static int chunk(int row, int c) { return row * kRowBytes + (c ^ (row & 7)) * 16; }

  /// Where chunk c + 2 step of a row is, given where its chunk c < 2 is.
  __device__ static int step_on(int place, int step) {
    return (place ^ step % 4 * 32) + step / 4 * 128;
  }
};

/// Copies of a warp: eight lanes share 128 bytes of a row, so that an instruction fetches four
/// rows.
template <typename T, typename Tile>
class RowCopies {
  static constexpr int kLanesOfRow = 8, kRowsAtOnce = 32 / kLanesOfRow;

 public:
  /// Of row 0 of a head, with strides in elements.
  __device__ RowCopies(const T* k, int64_t k_stride, const T* v, int64_t v_stride)
      : k_(reinterpret_cast<const char*>(k) + lane() % kLanesOfRow * 16),
        v_(reinterpret_cast<const char*>(v) + lane() % kLanesOfRow * 16),
        k_stride_(static_cast<int>(k_stride * sizeof(T))),
        v_stride_(static_cast<int>(v_stride * sizeof(T))) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = i * kRowsAtOnce + lane() / kLanesOfRow;
      place_[i] = Tile::chunk(row, lane() % kLanesOfRow);
    }
  }

  /// Begins to copy the rows of a tile, of which the lane knows one, -1 for zeros; lanes beyond the
  /// tile's rows repeat.
  __device__ __forceinline__ void begin(char* stage, int own_row) const {
#pragma unroll
    for (int first = 0; first < Tile::kRows; first += kRowsAtOnce) {
      const int row = __shfl_sync(0xffffffffu, own_row, first + lane() / kLanesOfRow);
      const bool some = row >= 0;
      const char* k = ptx::offset_by(k_, max(row, 0), k_stride_);
      const char* v = ptx::offset_by(v_, max(row, 0), v_stride_);
      char* to = stage + first / 8 * 8 * Tile::kRowBytes + place_[first / kRowsAtOnce % 2];
#pragma unroll
      for (int bytes = 0; bytes < Tile::kRowBytes; bytes += kLanesOfRow * 16) {
        ptx::cp_async_16(to + bytes, k + bytes, some, policy_);
        ptx::cp_async_16(to + Tile::kTileBytes + bytes, v + bytes, some, policy_);
      }
    }
  }

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  const char *k_, *v_;  // the lane's bytes of row 0
  int k_stride_, v_stride_;
  int place_[2];  // in a tile, of the lane's bytes of its first rows, and of those four further
  const uint64_t policy_ = ptx::evict_first();
};

}  // namespace rtpurbo::cuda
