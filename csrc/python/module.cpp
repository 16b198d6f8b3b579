#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", RTPURBO_VERSION},   {"torch", RTPURBO_TORCH_VERSION},
          {"cuda", RTPURBO_CUDA_VERSION}, {"cuda_architectures", RTPURBO_CUDA_ARCHITECTURES},
          {"compiler", RTPURBO_COMPILER}, {"cxx_standard", std::to_string(__cplusplus)}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side handles of rtpurbo; operators live in torch.ops.rtpurbo.";
  m.def("build_info", &build_info,
        "Versions and architectures that this build was compiled with, as strings.");
  rtpurbo::bind_cache(m);
}
