#include "csrc/cpu/capability.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

namespace rtpurbo {
namespace cpu {

Capability capability() {
  static const Capability chosen = [] {
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") return Capability::kAvx512;
    if (name == "AVX2") return Capability::kAvx2;
    return Capability::kDefault;
  }();
  return chosen;
}

}  // namespace cpu

namespace {

/// The name of the copy of the CPU kernels that runs in this process.
std::string cpu_capability() {
  switch (cpu::capability()) {
#ifdef RTPURBO_HAVE_AVX512
    case cpu::Capability::kAvx512:
      return "AVX512";
#endif
#ifdef RTPURBO_HAVE_AVX2
    case cpu::Capability::kAvx2:
      return "AVX2";
#endif
    default:
      return "DEFAULT";
  }
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) { m.def("cpu_capability() -> str", &cpu_capability); }

}  // namespace
}  // namespace rtpurbo
