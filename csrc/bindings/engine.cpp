#include "llama_moe/engine.h"

#include "bindings.h"
#include "llama_moe/error.h"

namespace llama_moe::bindings {
namespace {

py::object to_python(const std::optional<GeneratedToken>& token) {
    if (!token) {
        return py::none();
    }
    py::object top = py::none();
    if (token->logprob) {
        py::list entries;
        for (const auto& entry : token->top) {
            entries.append(py::make_tuple(entry.token, entry.text, entry.logprob));
        }
        top = std::move(entries);
    }
    return py::make_tuple(token->id, token->text, token->logprob, std::move(top));
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

// [n], or [rows, width].
py::array_t<float> to_array(const std::vector<float>& values, std::optional<int> width) {
    if (!width) {
        return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
    }
    const auto columns = static_cast<py::ssize_t>(*width);
    return py::array_t<float>({static_cast<py::ssize_t>(values.size()) / columns, columns}, values.data());
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
    py::class_<EngineOptions, ContextOptions>(m, "EngineOptions")
        .def(py::init<>())
        .def_readwrite("context_pool", &EngineOptions::context_pool)
        .def_readwrite("max_queue", &EngineOptions::max_queue)
        .def_readwrite("draft_tokens", &EngineOptions::draft_tokens)
        .def_readwrite("draft_ngram", &EngineOptions::draft_ngram)
        .def_readwrite("draft_min_probability", &EngineOptions::draft_min_probability)
        .def("validate", &EngineOptions::validate);

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
        .def("next", [](const GenerationHandle& generation) { return to_python(without_gil([&] { return generation->next(poll_signals()); })); })
        .def("cancel", [](const GenerationHandle& generation) { without_gil([&] { generation->cancel(); }); })
        .def("result", [](const GenerationHandle& generation) { return generation->result(); })
        .def(
            "take_values",
            [](const GenerationHandle& generation, std::optional<int> width) {
                return to_array(without_gil([&] { return generation->take_values(poll_signals()); }), width);
            },
            py::arg("width") = py::none());

    py::class_<EngineHandle>(m, "Engine")
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
            "submit",
            [](const EngineHandle& engine, const std::string& prompt, const SamplingOptions& sampling, bool wait) {
                return std::make_unique<GenerationHandle>(without_gil([&] { return engine->submit(prompt, sampling, wait, poll_signals()); }));
            },
            py::arg("prompt"), py::arg("sampling"), py::arg("wait") = false)
        .def(
            "submit",
            [](const EngineHandle& engine, const py::object& prompt, const SamplingOptions& sampling, bool wait) {
                auto tokens = to_integers(prompt, "prompt");
                return std::make_unique<GenerationHandle>(without_gil([&] { return engine->submit(std::move(tokens), sampling, wait, poll_signals()); }));
            },
            py::arg("prompt"), py::arg("sampling"), py::arg("wait") = false)
        .def(
            "submit_score",
            [](const EngineHandle& engine, const py::object& prompt, bool wait) {
                auto tokens = to_integers(prompt, "prompt");
                return std::make_unique<GenerationHandle>(without_gil([&] { return engine->submit_score(std::move(tokens), wait, poll_signals()); }));
            },
            py::arg("prompt"), py::arg("wait") = false)
        .def(
            "submit_embed",
            [](const EngineHandle& engine, const py::object& prompt, const std::string& pooling, bool normalise, bool wait) {
                auto tokens = to_integers(prompt, "prompt");
                const EmbeddingOptions options{parse_pooling(pooling), normalise};
                return std::make_unique<GenerationHandle>(
                    without_gil([&] { return engine->submit_embed(std::move(tokens), options, wait, poll_signals()); }));
            },
            py::arg("prompt"), py::arg("pooling"), py::arg("normalise"), py::arg("wait") = false)
        .def(
            "save_prefix",
            [](const EngineHandle& engine, const py::object& prompt) {
                auto tokens = to_integers(prompt, "prompt");
                return py::bytes(without_gil([&] { return engine->save_prefix(std::move(tokens), poll_signals()); }));
            },
            py::arg("prompt"))
        .def(
            "load_prefix",
            [](const EngineHandle& engine, const py::bytes& data) {
                const std::string copy = data;
                return without_gil([&] { return engine->load_prefix(copy, poll_signals()); });
            },
            py::arg("data"))
        .def("clear_prefixes", [](const EngineHandle& engine) { without_gil([&] { engine->clear_prefixes(poll_signals()); }); })
        .def_property_readonly("embedding_size", [](const EngineHandle& engine) { return engine->embedding_size(); })
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
