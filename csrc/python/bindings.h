#pragma once

#include <pybind11/pybind11.h>

namespace rtpurbo {

// Adds HeadwiseLayout to the module.
void bind_cache(pybind11::module_& m);

}  // namespace rtpurbo
