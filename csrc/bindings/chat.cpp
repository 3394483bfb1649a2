#include "llama_moe/chat.h"

#include "bindings.h"

namespace llama_moe::bindings {

void bind_chat(py::module_& m) {
    py::class_<ChatRequest>(m, "ChatRequest")
        .def(py::init<>())
        .def_readwrite("messages", &ChatRequest::messages)
        .def_readwrite("tools", &ChatRequest::tools)
        .def_readwrite("tool_choice", &ChatRequest::tool_choice)
        .def_readwrite("parallel_tool_calls", &ChatRequest::parallel_tool_calls)
        .def_readwrite("json_schema", &ChatRequest::json_schema)
        .def_readwrite("enable_thinking", &ChatRequest::enable_thinking)
        .def_readwrite("add_generation_prompt", &ChatRequest::add_generation_prompt)
        .def_readwrite("continue_final_message", &ChatRequest::continue_final_message)
        .def_readwrite("template_options", &ChatRequest::template_options);

    py::class_<ChatToolCall>(m, "ChatToolCall")
        .def_readonly("id", &ChatToolCall::id)
        .def_readonly("name", &ChatToolCall::name)
        .def_readonly("arguments", &ChatToolCall::arguments);

    py::class_<ChatMessage>(m, "ChatMessage")
        .def_readonly("content", &ChatMessage::content)
        .def_readonly("reasoning", &ChatMessage::reasoning)
        .def_readonly("tool_calls", &ChatMessage::tool_calls);

    py::class_<ChatDelta>(m, "ChatDelta")
        .def_readonly("content", &ChatDelta::content)
        .def_readonly("reasoning", &ChatDelta::reasoning)
        .def_readonly("tool_call", &ChatDelta::tool_call)
        .def_readonly("call", &ChatDelta::call);

    py::class_<ChatPrompt>(m, "ChatPrompt")
        .def_readonly("text", &ChatPrompt::text)
        .def("constrain", &ChatPrompt::constrain, py::arg("options"));

    py::class_<ChatTemplateHandle>(m, "ChatTemplate")
        .def(py::init([](const ModelHandle& model, const std::optional<std::string>& text) {
                 return std::make_unique<ChatTemplateHandle>(without_gil([&] { return ChatTemplate::create(model.get(), text); }));
             }),
             py::arg("model"), py::arg("text"))
        .def(
            "apply",
            [](const ChatTemplateHandle& chat, const ChatRequest& request) { return without_gil([&] { return chat->apply(request); }); },
            py::arg("request"))
        .def("capabilities", [](const ChatTemplateHandle& chat) { return chat->capabilities(); });

    py::class_<ChatParser>(m, "ChatParser")
        .def(py::init([](const ChatPrompt& prompt) { return std::make_unique<ChatParser>(prompt.syntax); }), py::arg("prompt"))
        .def(
            "push", [](ChatParser& parser, const std::string& text) { return without_gil([&] { return parser.push(text); }); }, py::arg("text"))
        .def("finish", [](ChatParser& parser) { return without_gil([&] { return parser.finish(); }); })
        .def_property_readonly("message", &ChatParser::message);
}

}  // namespace llama_moe::bindings
