#include "llama_moe/bandwidth.h"

#include "bindings.h"

namespace llama_moe::bindings {

void bind_bandwidth(py::module_& m) {
    py::class_<ProductRates>(m, "ProductRates")
        .def_readonly("bytes_per_second", &ProductRates::bytes_per_second)
        .def_readonly("disturbed", &ProductRates::disturbed);
    py::class_<DeviceRates>(m, "DeviceRates")
        .def_readonly("memory_bytes_per_second", &DeviceRates::memory_bytes_per_second)
        .def_readonly("copy_bytes_per_second", &DeviceRates::copy_bytes_per_second)
        .def_readonly("attention_bytes_per_second", &DeviceRates::attention_bytes_per_second)
        .def_readonly("operation_seconds", &DeviceRates::operation_seconds)
        .def_readonly("graph_seconds", &DeviceRates::graph_seconds)
        .def_readonly("crossing_seconds", &DeviceRates::crossing_seconds)
        .def_readonly("disturbed", &DeviceRates::disturbed);
    py::class_<DiskRate>(m, "DiskRate")
        .def_readonly("bytes_per_second", &DiskRate::bytes_per_second)
        .def_readonly("method", &DiskRate::method)
        .def_readonly("bytes_read", &DiskRate::bytes_read);
    m.def(
        "measure_products",
        [](const std::string& device, int threads, const std::string& layout, const std::vector<std::tuple<std::string, std::int64_t, bool>>& kinds) {
            std::vector<ProductKind> products;
            for (const auto& [type, columns, experts] : kinds) {
                products.push_back({type, columns, experts});
            }
            return without_gil([&] { return measure_products({device, threads, layout}, products, poll_signals()); });
        },
        py::arg("device"), py::arg("threads"), py::arg("layout"), py::arg("kinds"));
    m.def(
        "measure_device",
        [](const std::string& device, int threads) {
            return without_gil([&] { return measure_device({device, threads, "plain"}, poll_signals()); });
        },
        py::arg("device"), py::arg("threads"));
    m.def("measure_disk", [](const std::string& path) { return without_gil([&] { return measure_disk(path, poll_signals()); }); },
          py::arg("path"));
    m.def(
        "weight_layout", [](const ModelOptions& options) { return without_gil([&] { return weight_layout(options); }); }, py::arg("options"));
}

}  // namespace llama_moe::bindings
