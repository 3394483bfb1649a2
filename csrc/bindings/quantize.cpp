#include "llama_moe/quantize.h"

#include "bindings.h"

namespace llama_moe::bindings {
namespace {

using ProgressCallback = std::optional<py::typing::Callable<py::object(float)>>;

std::function<void(float)> progress_of(const ProgressCallback& on_progress) {
    if (!on_progress) {
        return {};
    }
    return [&on_progress](float share) {
        const GilHeld held;
        (*on_progress)(share);
    };
}

}  // namespace

void bind_quantize(py::module_& m) {
    py::class_<Imatrix::Entry>(m, "ImatrixEntry")
        .def_property_readonly("columns", [](const Imatrix::Entry& entry) { return entry.sums.size() / entry.counts.size(); })
        .def_readonly("counts", &Imatrix::Entry::counts);
    py::class_<Imatrix, std::shared_ptr<Imatrix>>(m, "Imatrix")
        .def_property_readonly("names",
                               [](const Imatrix& imatrix) {
                                   std::vector<std::string> names;
                                   for (const auto& [name, entry] : imatrix.entries) {
                                       names.push_back(name);
                                   }
                                   return names;
                               })
        .def("entry", [](const Imatrix& imatrix, const std::string& name) { return imatrix.entries.at(name); }, py::arg("name"))
        .def_readonly("datasets", &Imatrix::datasets)
        .def_readonly("chunk_count", &Imatrix::chunk_count)
        .def_readonly("chunk_size", &Imatrix::chunk_size)
        .def("weights", &Imatrix::weights, py::arg("name"));
    m.def(
        "read_imatrix", [](const std::string& path) { return without_gil([&] { return std::make_shared<Imatrix>(read_imatrix(path)); }); },
        py::arg("path"));
    m.def(
        "write_imatrix", [](const Imatrix& imatrix, const std::string& path) { without_gil([&] { write_imatrix(imatrix, path); }); },
        py::arg("imatrix"), py::arg("path"));
    py::class_<ImatrixOptions>(m, "ImatrixOptions")
        .def(py::init<>())
        .def_readwrite("context_size", &ImatrixOptions::chunk_size)
        .def_readwrite("chunks", &ImatrixOptions::chunks)
        .def_readwrite("output", &ImatrixOptions::output)
        .def_readwrite("threads", &ImatrixOptions::threads)
        .def_readwrite("dataset", &ImatrixOptions::dataset)
        .def("validate", &ImatrixOptions::validate);
    m.def(
        "collect_imatrix",
        [](const ModelHandle& model, const std::vector<std::int32_t>& tokens, const ImatrixOptions& options, const ProgressCallback& on_progress) {
            return without_gil([&] { return collect_imatrix(model.get(), tokens, options, progress_of(on_progress), poll_signals()); });
        },
        py::arg("model"), py::arg("tokens"), py::arg("options"), py::arg("on_progress") = py::none());

    py::class_<QuantizeOptions>(m, "QuantizeOptions")
        .def(py::init<>())
        .def_readwrite("type", &QuantizeOptions::type)
        .def_readwrite("experts", &QuantizeOptions::experts)
        .def_readwrite("attention", &QuantizeOptions::attention)
        .def_readwrite("output", &QuantizeOptions::output)
        .def_readwrite("embedding", &QuantizeOptions::embedding)
        .def_readwrite("rules", &QuantizeOptions::rules)
        .def_readwrite("requantize", &QuantizeOptions::requantize)
        .def_readwrite("threads", &QuantizeOptions::threads)
        .def_property(
            "imatrix", [](const QuantizeOptions& options) { return std::const_pointer_cast<Imatrix>(options.imatrix); },
            [](QuantizeOptions& options, std::shared_ptr<Imatrix> imatrix) { options.imatrix = std::move(imatrix); })
        .def("validate", &QuantizeOptions::validate);
    py::class_<QuantizedTensor>(m, "QuantizedTensor")
        .def_readonly("source", &QuantizedTensor::source)
        .def_readonly("type", &QuantizedTensor::type)
        .def_readonly("bytes", &QuantizedTensor::bytes)
        .def_readonly("wanted_type", &QuantizedTensor::wanted_type)
        .def_readonly("needs_imatrix", &QuantizedTensor::needs_imatrix);
    py::class_<QuantizePlan>(m, "QuantizePlan")
        .def_readonly("tensors", &QuantizePlan::tensors)
        .def_property_readonly("header", [](const QuantizePlan& plan) { return py::bytes(plan.header); })
        .def_readonly("file_bytes", &QuantizePlan::file_bytes);

    m.def("mix_names", &mix_names);
    m.def("tensor_type_names", &tensor_type_names);
    m.def(
        "plan_quantization",
        [](const std::string& source, const QuantizeOptions& options) {
            return without_gil([&] { return plan_quantization(source, options, poll_signals()); });
        },
        py::arg("source"), py::arg("options"));
    m.def(
        "quantize",
        [](const std::string& source, const std::string& target, const QuantizeOptions& options, const ProgressCallback& on_progress) {
            return without_gil([&] { return quantize(source, target, options, progress_of(on_progress), poll_signals()); });
        },
        py::arg("source"), py::arg("target"), py::arg("options"), py::arg("on_progress") = py::none());
}

}  // namespace llama_moe::bindings
