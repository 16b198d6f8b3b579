#pragma once
// Moves rows of q, k, v between their tensors and the operands of gemm.h.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/cpu/gemm.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// destination[i] = factor * source[i].
template <typename To, typename From>
void scale_row(const From* source, at::opmath_type<To> factor, To* destination, int64_t size) {
  using Accum = at::opmath_type<To>;
  using Vec = at::vec::Vectorized<Accum>;
  int64_t i = 0;
  if constexpr (sizeof(From) == 2 && sizeof(To) == 4) {
    constexpr int64_t kWidth = at::vec::Vectorized<From>::size();
    for (; i + kWidth <= size; i += kWidth) {
      const auto [low, high] =
          at::vec::convert_to_float(at::vec::Vectorized<From>::loadu(source + i));
      (low * Vec(factor)).store(destination + i);
      (high * Vec(factor)).store(destination + i + kWidth / 2);
    }
  } else if constexpr (sizeof(From) == 4 && sizeof(To) == 2) {
    constexpr int64_t kWidth = at::vec::Vectorized<To>::size();
    for (; i + kWidth <= size; i += kWidth) {
      at::vec::convert_from_float<To>(Vec::loadu(source + i) * Vec(factor),
                                      Vec::loadu(source + i + kWidth / 2) * Vec(factor))
          .store(destination + i);
    }
  }
  for (; i < size; ++i) destination[i] = static_cast<To>(static_cast<Accum>(source[i]) * factor);
}

/// Copies a row, converting where the types differ.
template <typename To, typename From>
void copy_row(const From* source, To* destination, int64_t size) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(destination, source, size * sizeof(To));
  } else {
    scale_row(source, at::opmath_type<To>(1), destination, size);
  }
}

/// Whether no element of the row is inf or NaN.
template <typename S>
bool is_finite(const S* row, int64_t size) {
  using Vec = at::vec::Vectorized<at::opmath_type<S>>;
  using Source = at::vec::Vectorized<S>;
  Vec sum(0);
  int64_t i = 0;
  for (; i + Source::size() <= size; i += Source::size()) {
    if constexpr (sizeof(S) == 2) {
      const auto [low, high] = at::vec::convert_to_float(Source::loadu(row + i));
      sum = sum + ((low - low) + (high - high));
    } else {
      const auto x = Source::loadu(row + i);
      sum = sum + (x - x);
    }
  }
  bool finite = sum.zero_mask() == (1 << Vec::size()) - 1;
  for (; i < size; ++i) finite &= std::isfinite(static_cast<at::opmath_type<S>>(row[i]));
  return finite;
}

inline constexpr int64_t kPackedGroup = 16;

/// Packs `count` rows of `size` elements as the transposed B operand [size, count] of gemm<T>, with
/// row length ldb. load(i, destination) writes row i; `staging` holds kPackedGroup rows.
template <typename T, typename Load>
void pack_loaded(const Load& load, int64_t count, int64_t size, T* packed, int64_t ldb,
                 T* staging) {
  using Unit =
      std::conditional_t<kPairedRows<T>, float, T>;  // a pair of 16-bit elements moves as one
  const int64_t units = size * sizeof(T) / sizeof(Unit);
  for (int64_t i = 0; i < count; i += kPackedGroup) {
    const int64_t group = std::min(kPackedGroup, count - i);
    for (int64_t g = 0; g < group; ++g) load(i + g, staging + g * size);
    at::vec::transpose_mxn<Unit>(reinterpret_cast<const Unit*>(staging), units,
                                 reinterpret_cast<Unit*>(packed) + i, ldb, static_cast<int>(group),
                                 static_cast<int>(units));
  }
}

/// pack_loaded for rows in memory: row(i) is the address of row i.
template <typename T, typename RowAt>
void pack_transposed(const RowAt& row, int64_t count, int64_t size, T* packed, int64_t ldb,
                     T* staging) {
  const auto load = [&](int64_t i, T* destination) { copy_row(row(i), destination, size); };
  pack_loaded(load, count, size, packed, ldb, staging);
}

/// Packs `count` rows of `size` elements as the B operand [count, size] of gemm<T>, with row length
/// size; rows up to `padded` are zero.
template <typename T, typename RowAt>
void pack_rows(const RowAt& row, int64_t count, int64_t padded, int64_t size, T* packed) {
  if constexpr (kPairedRows<T>) {
    auto* pairs = reinterpret_cast<uint32_t*>(packed);
    for (int64_t i = 0; i < padded; i += 2, pairs += size) {
      if (i + 1 < count) {
        const auto* low = reinterpret_cast<const uint16_t*>(row(i));
        const auto* high = reinterpret_cast<const uint16_t*>(row(i + 1));
        for (int64_t d = 0; d < size; ++d) {
          pairs[d] = uint32_t{low[d]} | uint32_t{high[d]} << 16;
        }
      } else if (i < count) {
        const auto* low = reinterpret_cast<const uint16_t*>(row(i));
        for (int64_t d = 0; d < size; ++d) pairs[d] = low[d];
      } else {
        std::memset(pairs, 0, size * sizeof(uint32_t));
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) copy_row(row(i), packed + i * size, size);
    std::memset(packed + count * size, 0, (padded - count) * size * sizeof(T));
  }
}

/// Zeroes row i of a B operand that pack_rows made.
template <typename T>
void clear_packed_row(T* packed, int64_t i, int64_t size) {
  constexpr int64_t kRows = kPairedRows<T> ? 2 : 1;
  T* first = packed + i / kRows * kRows * size + i % kRows;
  for (int64_t d = 0; d < size; ++d) first[d * kRows] = T(0);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
