#pragma once
// One row of an online softmax.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// exp to 20 ulp in float, full precision in double. Loses a NaN: callers carry it in the maximum.
template <typename Accum>
at::vec::Vectorized<Accum> fast_exp(const at::vec::Vectorized<Accum>& x) {
  if constexpr (std::is_same_v<Accum, float>) {
    return x.exp_u20();
  } else {
    return x.exp();
  }
}

/// Largest of `size` scores, a multiple of 32; NaN when one of them is NaN or +inf.
template <typename Accum>
Accum max_of_row(const Accum* scores, int64_t size) {
  using Vec = at::vec::Vectorized<Accum>;
  constexpr int64_t kWidth = Vec::size();
  Vec even = Vec::loadu(scores);
  Vec odd = Vec::loadu(scores + kWidth);
  for (int64_t i = 2 * kWidth; i < size; i += 2 * kWidth) {
    even = at::vec::maximum(even, Vec::loadu(scores + i));
    odd = at::vec::maximum(odd, Vec::loadu(scores + i + kWidth));
  }
  const Accum largest = at::vec::vec_reduce_all<Accum>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, at::vec::maximum(even, odd));
  return largest == std::numeric_limits<Accum>::infinity() ? std::numeric_limits<Accum>::quiet_NaN()
                                                           : largest;
}

/// Adds scale * scores[0, size) to a running softmax: updates the row's maximum score and the sum
/// of exp(scale * (score - maximum)), writes those terms as T to `weights` unless it is null (it
/// may be `scores`), and returns the factor by which earlier terms shrank. size is a multiple
/// of 32.
template <typename T, typename Accum>
Accum softmax_row(const Accum* scores, int64_t size, Accum scale, Accum& row_max, Accum& row_sum,
                  T* weights) {
  using Vec = at::vec::Vectorized<Accum>;
  constexpr int64_t kWidth = Vec::size();
  const Accum block_max = max_of_row(scores, size);
  const Accum new_max = block_max < row_max ? row_max : block_max;
  if (new_max == -std::numeric_limits<Accum>::infinity()) {
    if (weights) std::fill(weights, weights + size, T(0));
    return Accum(1);
  }
  const Vec factor(scale);
  const Vec shift(-new_max * scale);
  Vec sum(Accum(0));
  const auto term = [&](int64_t i) {
    return fast_exp(at::vec::fmadd(Vec::loadu(scores + i), factor, shift));
  };
  for (int64_t i = 0; i < size; i += 2 * kWidth) {
    const Vec low = term(i);
    const Vec high = term(i + kWidth);
    sum = sum + (low + high);
    if (!weights) continue;
    if constexpr (std::is_same_v<T, Accum>) {
      low.store(weights + i);
      high.store(weights + i + kWidth);
    } else {
      at::vec::convert_from_float<T>(low, high).store(weights + i);
    }
  }
  const Accum total = at::vec::vec_reduce_all<Accum>([](Vec& a, Vec& b) { return a + b; }, sum);
  const Accum decay = std::exp((row_max - new_max) * scale);
  row_sum = new_max == new_max ? row_sum * decay + total : new_max;
  row_max = new_max;
  return decay;
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
