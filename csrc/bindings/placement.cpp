#include "bindings.h"
#include "llama_moe/placement.h"

namespace llama_moe::bindings {
namespace {

using Policy = PlacementPolicy;

Policy with_projections(Policy::Kind kind, std::vector<std::string> projections) {
    Policy policy;
    policy.kind = kind;
    policy.projections = std::move(projections);
    return policy;
}

Policy with_count(Policy::Kind kind, int count, std::vector<std::string> projections) {
    Policy policy = with_projections(kind, std::move(projections));
    policy.count = count;
    return policy;
}

}  // namespace

void bind_placement(py::module_& m) {
    py::class_<Policy>(m, "PlacementPolicy")
        .def_static("gpu", [] { return with_projections(Policy::Kind::gpu, {}); })
        .def_static(
            "cpu", [](std::vector<std::string> projections) { return with_projections(Policy::Kind::cpu, std::move(projections)); },
            py::arg("projections"))
        .def_static(
            "cpu_first",
            [](int n, std::vector<std::string> projections) { return with_count(Policy::Kind::cpu_first, n, std::move(projections)); },
            py::arg("n"), py::arg("projections"))
        .def_static(
            "cpu_last",
            [](int n, std::vector<std::string> projections) { return with_count(Policy::Kind::cpu_last, n, std::move(projections)); },
            py::arg("n"), py::arg("projections"))
        .def_static(
            "cpu_layers",
            [](std::vector<int> layers, std::vector<std::string> projections) {
                Policy policy = with_projections(Policy::Kind::cpu_layers, std::move(projections));
                policy.layers = std::move(layers);
                return policy;
            },
            py::arg("layers"), py::arg("projections"))
        .def_static(
            "rules",
            [](std::vector<std::pair<std::string, std::string>> rules) {
                Policy policy = with_projections(Policy::Kind::rules, {});
                policy.rules = std::move(rules);
                return policy;
            },
            py::arg("rules"))
        .def_static(
            "fit",
            [](std::optional<std::uint64_t> vram, std::optional<std::uint64_t> ram, std::uint64_t reserve,
               std::vector<std::pair<std::string, std::string>> rules) {
                Policy policy;
                policy.kind = Policy::Kind::fit;
                policy.rules = std::move(rules);
                policy.vram = vram;
                policy.ram = ram;
                policy.reserve = reserve;
                return policy;
            },
            py::arg("vram"), py::arg("ram"), py::arg("reserve"), py::arg("rules"));

    py::class_<TensorPlacement>(m, "TensorPlacement")
        .def_readonly("name", &TensorPlacement::name)
        .def_readonly("device", &TensorPlacement::device)
        .def_property_readonly("role", [](const TensorPlacement& tensor) { return std::string(role_name(tensor.role)); })
        .def_readonly("bytes", &TensorPlacement::bytes);

    m.def(
        "resolve_placement",
        [](const std::string& path, const ModelOptions& options, const Policy& policy) {
            return without_gil([&] { return resolve_placement(path, options, policy, poll_signals()); });
        },
        py::arg("path"), py::arg("options"), py::arg("policy"));
}

}  // namespace llama_moe::bindings
