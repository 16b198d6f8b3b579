#pragma once
// Chooses, once per process, which compiled copy of the CPU kernels runs
// (cmake/CpuCapability.cmake).

namespace rtpurbo::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

/// The best capability that was compiled in and that ATen reports; ATEN_CPU_CAPABILITY lowers it.
Capability capability();

}  // namespace rtpurbo::cpu

#ifdef RTPURBO_HAVE_AVX512
#define RTPURBO_CASE_AVX512(kernel, params) \
  case Capability::kAvx512:                 \
    return AVX512::kernel(params);
#else
#define RTPURBO_CASE_AVX512(kernel, params)
#endif
#ifdef RTPURBO_HAVE_AVX2
#define RTPURBO_CASE_AVX2(kernel, params) \
  case Capability::kAvx2:                 \
    return AVX2::kernel(params);
#else
#define RTPURBO_CASE_AVX2(kernel, params)
#endif

/// Declares `kernel(const Params&)` in every capability's namespace and, in rtpurbo::cpu, the
/// function of the same name that calls the right one.
#define RTPURBO_DECLARE_CPU_KERNEL(kernel, Params) \
  namespace DEFAULT {                              \
  void kernel(const Params& params);               \
  }                                                \
  namespace AVX2 {                                 \
  void kernel(const Params& params);               \
  }                                                \
  namespace AVX512 {                               \
  void kernel(const Params& params);               \
  }                                                \
  inline void kernel(const Params& params) {       \
    switch (capability()) {                        \
      RTPURBO_CASE_AVX512(kernel, params)          \
      RTPURBO_CASE_AVX2(kernel, params)            \
      default:                                     \
        return DEFAULT::kernel(params);            \
    }                                              \
  }
