#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cache/headwise_layout.h"
#include "bindings.h"

namespace py = pybind11;

namespace rtpurbo {

void bind_cache(py::module_& m) {
  py::class_<HeadwiseLayout>(m, "HeadwiseLayout",
                             "Which KV heads a layer keeps whole, and what its cache needs.")
      .def(
          py::init([](int64_t kv_heads, std::vector<int64_t> full_heads, int64_t window,
                      int64_t sinks, int64_t head_dim, int64_t index_heads, int64_t index_dim,
                      int64_t index_bits, int64_t index_window, bool index_refine) {
            return HeadwiseLayout({kv_heads, std::move(full_heads), window, sinks, head_dim,
                                   index_heads, index_dim, index_bits, index_window, index_refine});
          }),
          py::kw_only(), py::arg("kv_heads"), py::arg("full_heads"), py::arg("window"),
          py::arg("sinks"), py::arg("head_dim"), py::arg("index_heads"), py::arg("index_dim"),
          py::arg("index_bits") = 16, py::arg("index_window") = 1, py::arg("index_refine") = false)
      .def_property_readonly("full_heads", &HeadwiseLayout::full_heads)
      .def_property_readonly("local_heads", &HeadwiseLayout::local_heads)
      .def_property_readonly("length", &HeadwiseLayout::length)
      .def_property_readonly("page_capacity", &HeadwiseLayout::page_capacity)
      .def_property_readonly("ring_capacity", &HeadwiseLayout::ring_capacity)
      .def_property_readonly("coded", &HeadwiseLayout::coded)
      .def_property_readonly("code_capacity", &HeadwiseLayout::code_capacity)
      .def_property_readonly("tail_capacity", &HeadwiseLayout::tail_capacity)
      .def("reserve", &HeadwiseLayout::reserve, py::arg("tokens"),
           "Makes room for more tokens; True if the tensors must grow.")
      .def("advance", &HeadwiseLayout::advance, py::arg("tokens"), "Counts tokens as stored.")
      .def("settle", &HeadwiseLayout::settle,
           "Counts index keys as quantised where they may be; returns how many joined.")
      .def("reset", &HeadwiseLayout::reset)
      .def("kv_bytes", &HeadwiseLayout::kv_bytes, py::arg("batch"), py::arg("itemsize"))
      .def("index_bytes", &HeadwiseLayout::index_bytes, py::arg("batch"))
      .def("dense_bytes", &HeadwiseLayout::dense_bytes, py::arg("batch"), py::arg("itemsize"))
      .def("__copy__", [](const HeadwiseLayout& self) { return self; })
      .def("__deepcopy__", [](const HeadwiseLayout& self, const py::dict&) { return self; });
}

}  // namespace rtpurbo
