#include "bindings.h"
#include "gguf_metadata.h"

namespace llama_moe::bindings {
namespace {

// Every model that may still be open, for shutdown(). The GIL guards it.
std::vector<std::weak_ptr<Model>>& open_models() {
    static auto* models = new std::vector<std::weak_ptr<Model>>;
    return *models;
}

std::unique_ptr<ModelHandle> load(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                  const std::optional<py::typing::Callable<py::object(float)>>& on_progress) {
    Model::Progress progress;
    if (on_progress) {
        progress = [&on_progress](float fraction) {
            const GilHeld held;
            (*on_progress)(fraction);
        };
    }
    auto model = without_gil([&] { return Model::load(path, options, policy, progress, poll_signals()); });
    auto& models = open_models();
    models.erase(std::remove_if(models.begin(), models.end(), [](const auto& weak) { return weak.expired(); }), models.end());
    models.push_back(model);
    return std::make_unique<ModelHandle>(std::move(model));
}

void shutdown() {
    const auto models = open_models();
    without_gil([&] {
        for (const auto& weak : models) {
            if (const auto model = weak.lock()) {
                model->close();
            }
        }
    });
}

}  // namespace

void bind_model(py::module_& m) {
    py::class_<ModelHandle>(m, "Model")
        .def_static("load", &load, py::arg("path"), py::arg("options"), py::arg("policy"), py::arg("on_progress") = py::none())
        .def_property_readonly("path", [](const ModelHandle& model) { return model->path(); })
        .def_property_readonly("placement", [](const ModelHandle& model) { return model->placement(); })
        .def_property_readonly("metadata", [](const ModelHandle& model) { return to_python(model->gguf().metadata); })
        .def_property_readonly("architecture", [](const ModelHandle& model) { return model->gguf().architecture; })
        .def_property_readonly("description", [](const ModelHandle& model) { return model->description(); })
        .def_property_readonly("expert_count", [](const ModelHandle& model) { return model->gguf().expert_count; })
        .def_property_readonly("experts_used", [](const ModelHandle& model) { return model->gguf().experts_used; })
        .def_property_readonly("layer_count", [](const ModelHandle& model) { return model->gguf().layer_count; })
        .def_property_readonly("size_bytes", [](const ModelHandle& model) { return model->gguf().size_bytes; })
        .def_property_readonly("parameter_count", [](const ModelHandle& model) { return model->gguf().parameter_count; })
        .def_property_readonly("vocab_size", [](const ModelHandle& model) { return model->vocab_size(); })
        .def_property_readonly("context_length", [](const ModelHandle& model) { return model->context_length(); })
        .def_property_readonly("embedding_length", [](const ModelHandle& model) { return model->embedding_length(); })
        .def_property_readonly("bos_token", [](const ModelHandle& model) { return model->bos_token(); })
        .def_property_readonly("eos_token", [](const ModelHandle& model) { return model->eos_token(); })
        .def_property_readonly("chat_template", [](const ModelHandle& model) { return model->chat_template(); })
        .def_property_readonly("expert_kernels", [](const ModelHandle& model) { return model->expert_kernels(); })
        .def("memory", [](const ModelHandle& model) { return to_tuples(model->memory()); })
        .def(
            "tokenize",
            [](const ModelHandle& model, const std::string& text, bool add_special, bool parse_special) {
                return without_gil([&] { return model->tokenize(text, add_special, parse_special); });
            },
            py::arg("text"), py::arg("add_special"), py::arg("parse_special"))
        .def(
            "detokenize",
            [](const ModelHandle& model, const py::object& ids, bool special) {
                const auto tokens = to_integers(ids, "ids");
                const auto text = without_gil([&] { return model->detokenize(tokens, special); });
                return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
            },
            py::arg("ids"), py::arg("special"))
        .def(
            "token_bytes", [](const ModelHandle& model, std::int32_t id) { return py::bytes(model->token_bytes(id, /*special=*/true)); },
            py::arg("id"))
        .def("is_end_of_generation", [](const ModelHandle& model, std::int32_t id) { return model->is_end_of_generation(id); }, py::arg("id"))
        .def("close", [](const ModelHandle& model) { without_gil([&] { model->close(); }); })
        .def_property_readonly("closed", [](const ModelHandle& model) { return without_gil([&] { return model->closed(); }); });
    m.def("shutdown", &shutdown);
}

}  // namespace llama_moe::bindings
