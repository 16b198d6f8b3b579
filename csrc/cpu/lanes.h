#pragma once
// Query rows in the lanes of vectors: logits lie transposed, [keys, rows], so that a softmax over
// keys reduces nothing across lanes, and key rows enter the product as they lie in memory.

#include <ATen/Dispatch.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "csrc/cpu/attention.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/rows.h"
#include "csrc/cpu/softmax.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

inline constexpr int64_t kLanes = 32;     // query rows of a block
inline constexpr int64_t kKeyTile = 256;  // keys of a tile

template <typename Accum>
using Lanes = std::array<Accum, kLanes>;

/// Rows of one head: `count` rows of a dtype, `stride` elements apart.
struct HeadRows {
  c10::ScalarType dtype;
  const void* ptr;
  int64_t stride;
  int64_t count;
};

inline HeadRows head_rows(c10::ScalarType dtype, const HeadsView& view, int64_t batch, int64_t head,
                          int64_t count) {
  const int64_t offset = batch * view.batch_stride + head * view.head_stride;
  return {dtype, static_cast<const char*>(view.ptr) + offset * c10::elementSize(dtype),
          view.row_stride, count};
}

/// Copies row `n` of `rows` to `destination`, as T.
template <typename T>
void copy_head_row(const HeadRows& rows, int64_t n, T* destination, int64_t dim) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.dtype, "copy_head_row", [&] {
    copy_row(static_cast<const scalar_t*>(rows.ptr) + n * rows.stride, destination, dim);
  });
}

/// Copies rows [n, n + count) of `rows` to `destination`, `dim` elements apart.
template <typename T>
void copy_head_rows(const HeadRows& rows, int64_t n, int64_t count, T* destination, int64_t dim) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.dtype, "copy_head_rows", [&] {
    const auto* source = static_cast<const scalar_t*>(rows.ptr) + n * rows.stride;
    for (int64_t i = 0; i < count; ++i) {
      copy_row(source + i * rows.stride, destination + i * dim, dim);
    }
  });
}

template <typename T>
struct Operand {
  const T* ptr;
  int64_t stride;
};

/// Rows [n, n + kKeyTile) as the A operand of gemm<T>: in place where they are T and all exist,
/// otherwise copied to `staging` [kKeyTile, dim] with zeros behind the last row.
template <typename T>
Operand<T> key_tile(const HeadRows& rows, int64_t n, int64_t dim, T* staging) {
  const int64_t count = std::min(kKeyTile, rows.count - n);
  if (rows.dtype == c10::CppTypeToScalarType<T>::value && count == kKeyTile) {
    return {static_cast<const T*>(rows.ptr) + n * rows.stride, rows.stride};
  }
  copy_head_rows(rows, n, count, staging, dim);
  std::fill(staging + count * dim, staging + kKeyTile * dim, T(0));
  return {staging, dim};
}

/// Packs up to kLanes rows of `size` elements as the B operand [size, kLanes] of gemm<T>.
template <typename T>
void pack_lanes(const T* rows, int64_t count, int64_t size, T* packed, T* staging) {
  std::fill(packed, packed + size * kLanes, T(0));
  pack_transposed([&](int64_t i) { return rows + i * size; }, count, size, packed, kLanes, staging);
}

/// For each lane the last key of the tile at n with key <= bound, in [-1, kKeyTile]; a comparison
/// with the key's place in the tile then is exact in any floating type.
template <typename Accum>
Lanes<Accum> last_in_tile(const std::array<int64_t, kLanes>& bounds, int64_t n) {
  Lanes<Accum> last;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    last[lane] = static_cast<Accum>(std::clamp<int64_t>(bounds[lane] - n, -1, kKeyTile));
  }
  return last;
}

/// a where the mask is set, else b.
template <typename Accum>
at::vec::Vectorized<Accum> choose(const at::vec::Vectorized<Accum>& mask,
                                  const at::vec::Vectorized<Accum>& a,
                                  const at::vec::Vectorized<Accum>& b) {
  return at::vec::Vectorized<Accum>::blendv(b, a, mask);
}

/// The largest value becomes NaN when it is +inf, so that bad logits show in every result.
template <typename Accum>
Accum poison_infinity(Accum value) {
  return value == std::numeric_limits<Accum>::infinity() ? std::numeric_limits<Accum>::quiet_NaN()
                                                         : value;
}

/// What exponents subtract: the maximum, or 0 while nothing has been seen.
template <typename Accum>
Accum finite_shift(Accum maximum) {
  return maximum == -std::numeric_limits<Accum>::infinity() ? Accum(0) : maximum;
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
