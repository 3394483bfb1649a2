#include "llama_moe/engine.h"

#include "bindings.h"

namespace llama_moe::bindings {
namespace {

py::tuple to_python(const GeneratedToken& token) {
    py::object top = py::none();
    if (token.logprob) {
        py::list entries;
        for (const auto& entry : token.top) {
            entries.append(py::make_tuple(entry.token, entry.text, entry.logprob));
        }
        top = std::move(entries);
    }
    return py::make_tuple(token.id, token.text, token.logprob, std::move(top));
}

py::typing::Tuple<py::list, bool> to_python(const Delivered& delivered) {
    py::list tokens(delivered.tokens.size());
    for (std::size_t i = 0; i < delivered.tokens.size(); i++) {
        PyList_SET_ITEM(tokens.ptr(), static_cast<Py_ssize_t>(i), to_python(delivered.tokens[i]).release().ptr());
    }
    return py::make_tuple(std::move(tokens), delivered.ended);
}

using OptionalNotifier = py::typing::Optional<NotifierHandle>;

DeliveryOptions delivery_options(const std::optional<double>& timeout, const OptionalNotifier& notifier, std::uint64_t tag) {
    return {timeout, notifier.is_none() ? nullptr : notifier.cast<const NotifierHandle&>().get(), tag};
}

std::map<std::string, std::variant<std::uint64_t, double>> to_python(const EngineStats& stats) {
    return {{"requests_submitted", stats.requests_submitted}, {"requests_finished", stats.requests_finished},
            {"requests_running", stats.requests_running},     {"requests_waiting", stats.requests_waiting},
            {"prompt_tokens", stats.prompt_tokens},           {"generated_tokens", stats.generated_tokens},
            {"decode_calls", stats.decode_calls},             {"decode_seconds", stats.decode_seconds},
            {"sample_seconds", stats.sample_seconds}};
}

}  // namespace

void bind_engine(py::module_& m) {
    py::class_<GenerationResult>(m, "GenerationResult")
        .def_readonly("finish_reason", &GenerationResult::finish_reason)
        .def_readonly("prompt_tokens", &GenerationResult::prompt_tokens)
        .def_readonly("cached_tokens", &GenerationResult::cached_tokens)
        .def_readonly("completion_tokens", &GenerationResult::completion_tokens)
        .def_readonly("queue_seconds", &GenerationResult::queue_seconds)
        .def_readonly("prompt_seconds", &GenerationResult::prompt_seconds)
        .def_readonly("decode_seconds", &GenerationResult::decode_seconds)
        .def_readonly("time_to_first_token", &GenerationResult::time_to_first_token);

    py::class_<GenerationHandle>(m, "Generation")
        .def(
            "take", [](const GenerationHandle& generation, bool wait) { return to_python(without_gil([&] { return generation->take(wait, poll_signals()); })); },
            py::arg("wait"))
        .def("cancel", [](const GenerationHandle& generation) { without_gil([&] { generation->cancel(); }); })
        .def("check_lost", [](const GenerationHandle& generation) { without_gil([&] { generation->check_lost(); }); })
        .def("result", [](const GenerationHandle& generation) { return generation->result(); });

    py::class_<EngineHandle>(m, "Engine")
        .def(py::init([](const ModelHandle& model, const ContextOptions& options) {
                 return std::make_unique<EngineHandle>(
                     without_gil([&, native = model.get()] { return Engine::create(native, options, poll_signals()); }));
             }),
             py::arg("model"), py::arg("options"))
        .def(
            "submit",
            [](const EngineHandle& engine, const std::string& prompt, const SamplingOptions& sampling, const std::optional<double>& timeout,
               const OptionalNotifier& notifier, std::uint64_t tag) {
                const auto delivery = delivery_options(timeout, notifier, tag);
                return std::make_unique<GenerationHandle>(without_gil([&] { return engine->submit(prompt, sampling, delivery); }));
            },
            py::arg("prompt"), py::arg("sampling"), py::arg("timeout") = py::none(), py::arg("notifier") = py::none(), py::arg("tag") = 0)
        .def(
            "submit",
            [](const EngineHandle& engine, const py::object& prompt, const SamplingOptions& sampling, const std::optional<double>& timeout,
               const OptionalNotifier& notifier, std::uint64_t tag) {
                auto tokens = to_integers(prompt, "prompt");
                const auto delivery = delivery_options(timeout, notifier, tag);
                return std::make_unique<GenerationHandle>(without_gil([&] { return engine->submit(std::move(tokens), sampling, delivery); }));
            },
            py::arg("prompt"), py::arg("sampling"), py::arg("timeout") = py::none(), py::arg("notifier") = py::none(), py::arg("tag") = 0)
        .def("memory", [](const EngineHandle& engine) { return to_tuples(without_gil([&] { return engine->memory(poll_signals()); })); })
        .def("breakdown", [](const EngineHandle& engine) { return to_tuples(without_gil([&] { return engine->breakdown(poll_signals()); })); })
        .def("stats", [](const EngineHandle& engine) { return to_python(engine->stats()); })
        .def_property_readonly("context_size", [](const EngineHandle& engine) { return engine->limits().context_size; })
        .def_property_readonly("max_sequences", [](const EngineHandle& engine) { return engine->limits().max_sequences; })
        .def_property_readonly("batch_size", [](const EngineHandle& engine) { return engine->limits().batch_size; })
        .def_property_readonly("micro_batch_size", [](const EngineHandle& engine) { return engine->limits().micro_batch_size; })
        .def_property_readonly("threads", [](const EngineHandle& engine) { return engine->limits().threads; })
        .def_property_readonly("threads_batch", [](const EngineHandle& engine) { return engine->limits().threads_batch; })
        .def("close", [](const EngineHandle& engine) { without_gil([&] { engine->close(); }); })
        .def_property_readonly("closed", [](const EngineHandle& engine) { return engine->closed(); });
}

}  // namespace llama_moe::bindings
