#include "csrc/cpu/top_p.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "csrc/cpu/top_p_row.h"

namespace rtpurbo::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
void top_p_rows(const TopPParams& params) {
  using Accum = at::opmath_type<T>;
  const auto* scores = static_cast<const T*>(params.scores_ptr);
  const auto* forced_lse = static_cast<const Accum*>(params.forced_lse_ptr);
  auto* mass = static_cast<Accum*>(params.mass_ptr);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, params.n));
  at::parallel_for(0, params.rows, grain, [&](int64_t begin, int64_t end) {
    TopPScratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      int32_t* indices = params.indices_ptr + row * params.n;
      const double forced = forced_lse ? forced_lse[row] : -std::numeric_limits<double>::infinity();
      const TopPResult result =
          top_p_row(scores + row * params.scores_row_stride, params.n, params.p, params.min_members,
                    forced, params.exact, indices, scratch);
      std::fill(indices + result.count, indices + params.n, -1);
      params.counts_ptr[row] = static_cast<int32_t>(result.count);
      mass[row] = static_cast<Accum>(result.mass);
    }
  });
}

}  // namespace

void top_p_kernel(const TopPParams& params) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, params.dtype, "top_p",
                                  [&] { top_p_rows<scalar_t>(params); });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
