#pragma once
// C (+)= A B on raw row-major buffers: oneDNN's brgemm through ATen where the CPU has it (AVX-512),
// otherwise a register-blocked kernel on at::vec. ATen exports no gemm on pointers.

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <array>
#include <cstdint>
#include <type_traits>

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// B operands of 16-bit types hold rows in pairs: element (k, n) at ((k / 2) * ldb + n) * 2 + k
/// % 2.
template <typename T>
inline constexpr bool kPairedRows = sizeof(T) == 2;

/// Whether gemm<T> runs on brgemm here. 16-bit T needs this; float and double always work.
template <typename T>
bool has_brgemm() {
#ifdef CPU_CAPABILITY_AVX512
  static const bool available = [] {
    if constexpr (std::is_same_v<T, double> || std::is_same_v<T, at::Half>) return false;
    if (std::is_same_v<T, at::BFloat16> && !__builtin_cpu_supports("avx512bf16")) return false;
    std::array<T, 32 * 32> a{}, b{};
    std::array<float, 32 * 32> c{};
    try {
      if constexpr (!std::is_same_v<T, double>) {
        at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(),
                                    kPairedRows<T>);
        at::native::cpublas::brgemm_release(kPairedRows<T>);
      }
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return available;
#else
  return false;
#endif
}

/// kRows x (kVectors registers) of C. With kVectors 1, only `width` columns exist.
template <int kRows, int kVectors, typename T>
void gemm_registers(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                    bool accumulate, int64_t width) {
  using Vec = at::vec::Vectorized<T>;
  std::array<std::array<Vec, kVectors>, kRows> sums;
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const T* tile = c + i * ldc + v * Vec::size();
      sums[i][v] = !accumulate     ? Vec(T(0))
                   : kVectors == 1 ? Vec::loadu(tile, width)
                                   : Vec::loadu(tile);
    }
  }
  for (int64_t step = 0; step < k; ++step) {
    std::array<Vec, kVectors> row;
    for (int v = 0; v < kVectors; ++v) {
      const T* tile = b + step * ldb + v * Vec::size();
      row[v] = kVectors == 1 ? Vec::loadu(tile, width) : Vec::loadu(tile);
    }
    for (int i = 0; i < kRows; ++i) {
      const Vec left(a[i * lda + step]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = at::vec::fmadd(left, row[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v].store(c + i * ldc + v * Vec::size(), kVectors == 1 ? width : Vec::size());
    }
  }
}

/// gemm_registers down all m rows of one column panel.
template <int kVectors, typename T>
void gemm_panel(int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                int64_t ldc, bool accumulate, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    gemm_registers<4, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate, width);
  }
  const auto last_rows = [&]<int kRows>(std::integral_constant<int, kRows>) {
    gemm_registers<kRows, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate,
                                    width);
  };
  switch (m - i) {
    case 3:
      return last_rows(std::integral_constant<int, 3>{});
    case 2:
      return last_rows(std::integral_constant<int, 2>{});
    case 1:
      return last_rows(std::integral_constant<int, 1>{});
    default:
      return;
  }
}

/// C[m, n] = A[m, k] B[k, n], added to C when `accumulate`; row-major. 16-bit operands need an even
/// k, B in paired rows and has_brgemm<T>(). On brgemm every new shape compiles a kernel once a
/// thread: callers pad their tiles to few shapes.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
          at::opmath_type<T>* c, int64_t ldc, bool accumulate) {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_brgemm<T>()) {
      at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, kPairedRows<T>);
      return;
    }
  }
  if constexpr (!kPairedRows<T>) {
    constexpr int64_t kWidth = at::vec::Vectorized<T>::size();
    int64_t j = 0;
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
      gemm_panel<2>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate, 2 * kWidth);
    }
    for (; j < n; j += kWidth) {
      gemm_panel<1>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate, std::min(kWidth, n - j));
    }
  }
}

/// Gives the thread's brgemm state back; call once a thread after its last gemm<T>.
template <typename T>
void gemm_release() {
  if (has_brgemm<T>()) at::native::cpublas::brgemm_release(kPairedRows<T>);
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
