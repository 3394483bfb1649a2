#include "bindings.h"
#include "llama_moe/device.h"

namespace llama_moe::bindings {

void bind_devices(py::module_& m) {
    py::class_<Device>(m, "Device")
        .def_readonly("name", &Device::name)
        .def_readonly("description", &Device::description)
        .def_readonly("kind", &Device::kind)
        .def_readonly("backend", &Device::backend)
        .def_readonly("memory_free", &Device::memory_free)
        .def_readonly("memory_total", &Device::memory_total)
        .def("__repr__", [](const Device& device) {
            return "Device(name='" + device.name + "', description='" + device.description + "', kind='" + device.kind + "', backend='" +
                   device.backend + "', memory_free=" + std::to_string(device.memory_free) +
                   ", memory_total=" + std::to_string(device.memory_total) + ")";
        });
    m.def("devices", [] { return without_gil([] { return devices(poll_signals()); }); });
    m.def(
        "add_rpc_device",
        [](const std::string& endpoint, double answer_timeout) {
            return without_gil([&] { return add_rpc_device(endpoint, answer_timeout, poll_signals()); });
        },
        py::arg("endpoint"), py::arg("answer_timeout"));
    m.def(
        "run_worker",
        [](const std::string& endpoint, int threads, const std::optional<std::string>& cache_dir) {
            py::gil_scoped_release release;
            run_worker(endpoint, threads, cache_dir);
        },
        py::arg("endpoint"), py::arg("threads"), py::arg("cache_dir"));
    m.def("build_info", [] {
        std::map<std::string, std::string> info;
        for (auto& [key, value] : build_info()) {
            info.emplace(key, value);
        }
        return info;
    });
    m.def("usable_cores", &usable_cores);
}

}  // namespace llama_moe::bindings
