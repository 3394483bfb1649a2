#include "llama_moe/engine.h"

#include "bindings.h"
#include "llama_moe/error.h"

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

DeliveryOptions delivery_options(const std::optional<double>& timeout, const OptionalNotifier& notifier, std::uint64_t tag, bool wait_for_room) {
    return {timeout, notifier.is_none() ? nullptr : notifier.cast<const NotifierHandle&>().get(), tag, wait_for_room};
}

// Adds a way to submit a request, with what all of them take for delivery behind its own arguments.
template <typename... Arguments, typename Submit, typename... Extra>
void def_submit(py::class_<EngineHandle>& engine, const char* name, Submit submit, const Extra&... extra) {
    engine.def(
        name,
        [submit](const EngineHandle& handle, Arguments... arguments, const std::optional<double>& timeout, const OptionalNotifier& notifier,
                 std::uint64_t tag, bool wait_for_room) {
            const auto delivery = delivery_options(timeout, notifier, tag, wait_for_room);
            return std::make_unique<GenerationHandle>(submit(handle, arguments..., delivery));
        },
        extra..., py::arg("timeout") = py::none(), py::arg("notifier") = py::none(), py::arg("tag") = 0, py::arg("wait_for_room") = false);
}

std::map<std::string, std::variant<std::uint64_t, double>> to_python(const EngineStats& stats) {
    return {{"requests_submitted", stats.requests_submitted}, {"requests_finished", stats.requests_finished},
            {"requests_running", stats.requests_running},     {"requests_waiting", stats.requests_waiting},
            {"requests_preempted", stats.requests_preempted}, {"prompt_tokens", stats.prompt_tokens},
            {"cached_tokens", stats.cached_tokens},           {"generated_tokens", stats.generated_tokens},
            {"draft_tokens", stats.draft_tokens},             {"draft_tokens_accepted", stats.draft_tokens_accepted},
            {"decode_calls", stats.decode_calls},             {"decode_seconds", stats.decode_seconds},
            {"sample_seconds", stats.sample_seconds}};
}

Pooling parse_pooling(const std::string& name) {
    const std::map<std::string, Pooling> known = {{"none", Pooling::none}, {"mean", Pooling::mean}, {"cls", Pooling::cls}, {"last", Pooling::last}};
    const auto found = known.find(name);
    if (found == known.end()) {
        throw InvalidOptionError("pooling is '" + name + "'; it must be mean, last, cls or none");
    }
    return found->second;
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
        .def("result", [](const GenerationHandle& generation) { return generation->result(); })
        .def("take_values", [](const GenerationHandle& generation) {
            const auto values = without_gil([&] { return generation->take_values(poll_signals()); });
            return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
        });

    py::class_<EngineHandle> engine(m, "Engine");
    engine
        .def(py::init([](const ModelHandle& model, const EngineOptions& options) {
                 return std::make_unique<EngineHandle>(
                     without_gil([&, native = model.get()] { return Engine::create(native, options, nullptr, poll_signals()); }));
             }),
             py::arg("model"), py::arg("options"))
        .def(py::init([](const ModelHandle& model, const EngineOptions& options, const ModelHandle& draft_model) {
                 return std::make_unique<EngineHandle>(without_gil([&, native = model.get(), draft = draft_model.get()] {
                     return Engine::create(native, options, draft, poll_signals());
                 }));
             }),
             py::arg("model"), py::arg("options"), py::arg("draft_model"))
        .def_static(
            "idle",
            [](const ModelHandle& model, const EngineOptions& options) {
                return std::make_unique<EngineHandle>(
                    without_gil([&, native = model.get()] { return Engine::create_idle(native, options, poll_signals()); }));
            },
            py::arg("model"), py::arg("options"))
        .def(
            "save_prefix",
            [](const EngineHandle& engine, const py::object& prompt) {
                auto tokens = to_integers(prompt, "prompt");
                return to_bytes(without_gil([&] { return engine->save_prefix(std::move(tokens), poll_signals()); }));
            },
            py::arg("prompt"))
        .def(
            "load_prefix",
            [](const EngineHandle& engine, const py::bytes& data) {
                return without_gil([&, view = std::string_view(data)] { return engine->load_prefix(view, poll_signals()); });
            },
            py::arg("data"))
        .def("clear_prefixes", [](const EngineHandle& engine) { without_gil([&] { engine->clear_prefixes(poll_signals()); }); })
        .def_property_readonly("embedding_size", [](const EngineHandle& engine) { return engine->embedding_size(); })
        .def("memory", [](const EngineHandle& engine) { return to_tuples(without_gil([&] { return engine->memory(poll_signals()); })); })
        .def("breakdown", [](const EngineHandle& engine) { return to_tuples(without_gil([&] { return engine->breakdown(poll_signals()); })); })
        .def("stats", [](const EngineHandle& engine) { return to_python(without_gil([&] { return engine->stats(); })); })
        .def_property_readonly("context_size", [](const EngineHandle& engine) { return engine->limits().context_size; })
        .def_property_readonly("max_sequences", [](const EngineHandle& engine) { return engine->limits().max_sequences; })
        .def_property_readonly("batch_size", [](const EngineHandle& engine) { return engine->limits().batch_size; })
        .def_property_readonly("micro_batch_size", [](const EngineHandle& engine) { return engine->limits().micro_batch_size; })
        .def_property_readonly("threads", [](const EngineHandle& engine) { return engine->limits().threads; })
        .def_property_readonly("threads_batch", [](const EngineHandle& engine) { return engine->limits().threads_batch; })
        .def("close", [](const EngineHandle& engine) { without_gil([&] { engine->close(); }); })
        .def_property_readonly("closed", [](const EngineHandle& engine) { return without_gil([&] { return engine->closed(); }); })
        .def_property_readonly("lost", [](const EngineHandle& engine) { return without_gil([&] { return engine->lost(); }); });
    def_tracing(engine);
    def_submit<const std::string&, const SamplingOptions&>(
        engine, "submit",
        [](const EngineHandle& handle, const std::string& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery) {
            return without_gil([&] { return handle->submit(prompt, sampling, delivery, poll_signals()); });
        },
        py::arg("prompt"), py::arg("sampling"));
    def_submit<const py::object&, const SamplingOptions&>(
        engine, "submit",
        [](const EngineHandle& handle, const py::object& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery) {
            auto tokens = to_integers(prompt, "prompt");
            return without_gil([&] { return handle->submit(std::move(tokens), sampling, delivery, poll_signals()); });
        },
        py::arg("prompt"), py::arg("sampling"));
    def_submit<const py::object&>(
        engine, "submit_score",
        [](const EngineHandle& handle, const py::object& prompt, const DeliveryOptions& delivery) {
            auto tokens = to_integers(prompt, "prompt");
            return without_gil([&] { return handle->submit_score(std::move(tokens), delivery, poll_signals()); });
        },
        py::arg("prompt"));
    def_submit<const py::object&, const std::string&, bool>(
        engine, "submit_embed",
        [](const EngineHandle& handle, const py::object& prompt, const std::string& pooling, bool normalise, const DeliveryOptions& delivery) {
            auto tokens = to_integers(prompt, "prompt");
            const EmbeddingOptions options{parse_pooling(pooling), normalise};
            return without_gil([&] { return handle->submit_embed(std::move(tokens), options, delivery, poll_signals()); });
        },
        py::arg("prompt"), py::arg("pooling"), py::arg("normalise"));
}

}  // namespace llama_moe::bindings
