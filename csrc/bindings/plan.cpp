#include "llama_moe/plan.h"

#include "bindings.h"

namespace llama_moe::bindings {

void bind_plan(py::module_& m) {
    py::class_<Shortfall>(m, "Shortfall")
        .def_readonly("device", &Shortfall::device)
        .def_readonly("needed", &Shortfall::needed)
        .def_readonly("capacity", &Shortfall::capacity);

    py::class_<Plan>(m, "Plan")
        .def_property_readonly("tensors", [](const Plan& plan) { return plan.placement.tensors; })
        .def_readonly("tensor_layers", &Plan::tensor_layers)
        .def_readonly("layer_devices", &Plan::layer_devices)
        .def_property_readonly("summary", [](const Plan& plan) { return plan.placement.summary; })
        .def_property_readonly("rows", [](const Plan& plan) { return to_tuples(plan.rows); })
        .def_readonly("capacities", &Plan::capacities)
        .def_readonly("shortfalls", &Plan::shortfalls);

    m.def(
        "make_plan",
        [](const std::string& path, const ModelOptions& options, const PlacementPolicy& policy, std::optional<std::uint64_t> ram) {
            return without_gil([&] { return make_plan(path, options, policy, ram, poll_signals()); });
        },
        py::arg("path"), py::arg("options"), py::arg("policy"), py::arg("ram"));
}

}  // namespace llama_moe::bindings
