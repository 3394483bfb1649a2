#include <map>

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
            const GilReleased released;
            run_worker(endpoint, threads, cache_dir);
        },
        py::arg("endpoint"), py::arg("threads"), py::arg("cache_dir"));
    m.def("build_info", [] {
        const auto facts = without_gil([] { return build_info(); });
        return std::map<std::string, std::string>(facts.begin(), facts.end());
    });
    m.def(
        "set_plugin_loader",
        [](const py::typing::Callable<void()>& function) {
            // Kept for good, as the log's sink is: static destruction is too late for Python objects.
            auto* loader = new py::object(function);
            set_plugin_loader([loader] {
                const GilHeld held;
                (*loader)();
            });
        },
        py::arg("function"));
    m.def("load_plugin", [](const std::string& library) { return without_gil([&] { return load_plugin(library); }); }, py::arg("library"));
    m.def("usable_cores", &usable_cores);
}

}  // namespace llama_moe::bindings
