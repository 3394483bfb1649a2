#include "llama_moe/chat.h"

#include <algorithm>
#include <cctype>
#include <random>
#include <utility>

#include "chat.h"
#include "common.h"
#include "llama_moe/error.h"
#include "llama_moe/process.h"
#include "loaded_model.h"
#include "native_thread.h"

namespace llama_moe {

struct ChatSyntax {
    common_chat_parser_params params;
};

namespace {

constexpr std::size_t kToolCallIdSize = 9;  // some templates refuse any other length
constexpr const char* kSpaces = " \t\r\n";
// Each parse reads the whole text. Past this size it is parsed once it has grown by the given share, which bounds the sum.
constexpr std::size_t kParseAlways = 8 * 1024;
constexpr std::size_t kParseShare = 256;

constexpr const char* kAnyJson = R"({"type": ["object", "array", "string", "number", "boolean", "null"]})";

std::string random_id() {
    static constexpr std::string_view kLetters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    std::random_device random;
    std::uniform_int_distribution<std::size_t> letter(0, kLetters.size() - 1);
    std::string id;
    while (id.size() < kToolCallIdSize) {
        id += kLetters[letter(random)];
    }
    return id;
}

// Runs what llama.cpp's chat code throws plain exceptions from.
template <typename Work>
auto reporting(const char* what, Work&& work) {
    const NativeScope scope;
    try {
        return work();
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw InvalidOptionError(std::string(what) + ": " + error.what());
    }
}

common_chat_templates_inputs inputs_of(const ChatRequest& request) {
    common_chat_templates_inputs inputs;
    inputs.messages = reporting("messages", [&] { return common_chat_msgs_parse_oaicompat(common_json::parse(request.messages)); });
    if (!request.tools.empty()) {
        inputs.tools = reporting("tools", [&] { return common_chat_tools_parse_oaicompat(common_json::parse(request.tools)); });
    }
    inputs.tool_choice = reporting("tool_choice", [&] { return common_chat_tool_choice_parse_oaicompat(request.tool_choice); });
    inputs.parallel_tool_calls = request.parallel_tool_calls;
    inputs.json_schema = request.json_schema;
    if (const auto schema = common_json::parse_no_throw(request.json_schema); schema == true || (schema.is_object() && schema.empty())) {
        inputs.json_schema = kAnyJson;  // to the templates an empty schema is none
    }
    inputs.enable_thinking = request.enable_thinking;
    inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
    inputs.add_generation_prompt = request.add_generation_prompt && !request.continue_final_message;
    inputs.continue_final_message = request.continue_final_message ? COMMON_CHAT_CONTINUATION_AUTO : COMMON_CHAT_CONTINUATION_NONE;
    inputs.chat_template_kwargs = request.template_options;
    return inputs;
}

void check_tools(const ChatRequest& request, const std::map<std::string, bool>& capabilities) {
    const bool any = capabilities.at("supports_tools") || capabilities.at("supports_tool_calls");
    if (!request.tools.empty() && request.tool_choice != "none" && !any) {
        throw InvalidOptionError("tools are given, but the chat template has no place for them; use another model or template, or tool_choice='none'");
    }
}

ChatGrammar grammar_of(const common_chat_params& params, const Model& model, std::vector<std::int32_t>& preserved) {
    const auto tokens_of = [&model](const std::string& text) { return model.tokenize(text, /*add_special=*/false, /*parse_special=*/true); };
    ChatGrammar grammar;
    grammar.text = params.grammar;
    grammar.lazy = params.grammar_lazy;
    for (const auto& trigger : params.grammar_triggers) {
        if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN) {
            grammar.trigger_tokens.push_back(trigger.token);
        } else if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN) {
            grammar.trigger_patterns.push_back(trigger.value);
        } else if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL) {
            grammar.trigger_patterns.push_back("^(?:" + trigger.value + ")$");
        } else if (const auto tokens = tokens_of(trigger.value); tokens.size() == 1) {
            grammar.trigger_tokens.push_back(tokens.front());
            preserved.push_back(tokens.front());
        } else {
            grammar.trigger_patterns.push_back(regex_escape(trigger.value));
        }
    }
    grammar.prefill = tokens_of(params.generation_prompt);
    if (!grammar.prefill.empty()) {
        // Some tokenizers put a space before a text's first token.
        const std::string first = model.token_bytes(grammar.prefill.front(), /*special=*/true);
        const auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
        if (!first.empty() && is_space(first.front()) && !is_space(params.generation_prompt.front())) {
            grammar.prefill.erase(grammar.prefill.begin());
        }
    }
    grammar.thinking_start = tokens_of(params.thinking_start_tag);
    for (const auto& tag : params.thinking_end_tags) {
        grammar.thinking_end.push_back(tokens_of(tag));
    }
    return grammar;
}

std::string trimmed(const std::string& text) {
    const auto begin = text.find_first_not_of(kSpaces);
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kSpaces) - begin + 1);
}

// The part of `text` behind what was given of it; nothing when it became another text.
std::string rest_of(const std::string& text, const std::string& given) {
    return text.compare(0, given.size(), given) == 0 ? text.substr(given.size()) : "";
}

}  // namespace

SamplingOptions ChatPrompt::constrain(SamplingOptions options) const {
    options.stop.insert(options.stop.end(), stop.begin(), stop.end());
    options.preserved_tokens = preserved_tokens;
    options.chat_grammar = grammar;
    options.json_schema = grammar.text.empty() ? json_schema : std::nullopt;
    return options;
}

struct ChatTemplate::Native {
    common_chat_templates_ptr templates;
};

ChatTemplate::ChatTemplate(std::shared_ptr<Model> model, std::unique_ptr<Native> native)
    : model_(std::move(model)), native_(std::move(native)) {}

ChatTemplate::~ChatTemplate() = default;

std::shared_ptr<ChatTemplate> ChatTemplate::create(const std::shared_ptr<Model>& model, const std::optional<std::string>& text) {
    const auto loaded = model->acquire();
    if (!text && !model->chat_template()) {
        throw InvalidOptionError("the model '" + model->path() + "' has no chat template; give one with template=");
    }
    if (text && text->empty()) {
        throw InvalidOptionError("template is empty; it must be a Jinja chat template, or None for the model's own");
    }
    return reporting("the chat template cannot be used", [&] {
        // Parsed here first: from below, what is wrong with it comes as an exception without a text.
        const common_chat_template probe(text ? *text : *model->chat_template(), "", "");
        auto native = std::make_unique<Native>();
        native->templates = common_chat_templates_init(loaded->model, text.value_or(""));
        return std::shared_ptr<ChatTemplate>(new ChatTemplate(model, std::move(native)));
    });
}

std::map<std::string, bool> ChatTemplate::capabilities() const {
    return common_chat_templates_get_caps(native_->templates.get());
}

ChatPrompt ChatTemplate::apply(const ChatRequest& request) const {
    require_same_process("the chat template");
    check_tools(request, capabilities());
    const auto inputs = inputs_of(request);
    if (inputs.messages.empty()) {
        throw InvalidOptionError("messages is empty; give at least one message");
    }
    const auto params = reporting("the chat template refused the messages", [&] {
        const std::lock_guard<std::mutex> lock(mutex_);
        return common_chat_templates_apply(native_->templates.get(), inputs);
    });
    const bool forced = inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED;
    if (forced && !inputs.tools.empty() && params.grammar.empty()) {
        throw InvalidOptionError("tool_choice='required' cannot be enforced: how the chat template writes tool calls is not known");
    }
    ChatPrompt prompt;
    prompt.text = params.prompt;
    prompt.stop = params.additional_stops;
    for (const auto& text : params.preserved_tokens) {
        const auto tokens = model_->tokenize(text, /*add_special=*/false, /*parse_special=*/true);
        if (tokens.size() == 1) {
            prompt.preserved_tokens.push_back(tokens.front());
        }
    }
    if (!request.json_schema.empty()) {
        prompt.json_schema = request.json_schema;
    }
    if (!params.grammar.empty()) {
        prompt.grammar = grammar_of(params, *model_, prompt.preserved_tokens);
    }
    prompt.syntax = reporting("the chat template's format", [&] {
        auto syntax = std::make_shared<ChatSyntax>();
        syntax->params = common_chat_parser_params(params);
        syntax->params.reasoning_format = inputs.reasoning_format;
        syntax->params.is_continuation = request.continue_final_message;
        if (!params.parser.empty()) {
            syntax->params.parser.load(params.parser);
        }
        return syntax;
    });
    return prompt;
}

ChatParser::ChatParser(std::shared_ptr<const ChatSyntax> syntax) : syntax_(std::move(syntax)) {
    if (syntax_->params.is_continuation) {
        if (const auto parsed = parse(/*partial=*/true)) {
            prefill_ = *parsed;
        }
    }
}

ChatParser::~ChatParser() = default;

// Unset when the text is not of the format.
std::optional<ChatMessage> ChatParser::parse(bool partial) const {
    const NativeScope scope;
    try {
        const auto parsed = common_chat_parse(text_, partial, syntax_->params);
        ChatMessage result;
        result.reasoning = rest_of(trimmed(parsed.reasoning_content), prefill_.reasoning);
        std::string content = parsed.render_content();
        if (!parsed.reasoning_content.empty()) {
            content.erase(0, content.find_first_not_of(kSpaces));
        }
        result.content = rest_of(content, prefill_.content);
        for (const auto& call : parsed.tool_calls) {
            result.tool_calls.push_back({call.id, call.name, call.arguments});
        }
        return result;
    } catch (const std::exception&) {
        return std::nullopt;
    }
}

std::vector<ChatDelta> ChatParser::push(const std::string& text) {
    text_ += text;
    const bool grown = text_.size() < kParseAlways || text_.size() - parsed_size_ >= text_.size() / kParseShare;
    if (text.empty() || finished_ || !grown) {
        return {};
    }
    parsed_size_ = text_.size();
    auto parsed = parse(/*partial=*/true);
    return parsed ? advance(std::move(*parsed), false) : std::vector<ChatDelta>{};
}

std::vector<ChatDelta> ChatParser::finish() {
    if (finished_) {
        return {};
    }
    finished_ = true;
    auto parsed = parse(/*partial=*/false);
    if (!parsed) {
        parsed.emplace();
        parsed->content = text_;
    }
    return advance(std::move(*parsed), true);
}

std::vector<ChatDelta> ChatParser::advance(ChatMessage parsed, bool last) {
    auto& calls = parsed.tool_calls;
    for (std::size_t i = 0; i < calls.size(); i++) {
        // An id that was given out stays, also when the model writes one of its own later.
        if (i < given_.tool_calls.size()) {
            calls[i].id = given_.tool_calls[i].id;
        } else if (calls[i].id.empty()) {
            calls[i].id = random_id();
        }
    }
    message_ = std::move(parsed);
    std::vector<ChatDelta> deltas;
    ChatDelta text;
    text.reasoning = rest_of(message_.reasoning, given_.reasoning);
    text.content = rest_of(message_.content, given_.content);
    given_.reasoning += text.reasoning;
    given_.content += text.content;
    if (!text.reasoning.empty() || !text.content.empty()) {
        deltas.push_back(std::move(text));
    }
    for (std::size_t i = 0; i < message_.tool_calls.size(); i++) {
        const auto& call = message_.tool_calls[i];
        const bool is_new = i == given_.tool_calls.size();
        // A name may still grow until something follows it.
        if (call.name.empty() || (is_new && !last && call.arguments.empty() && i + 1 == message_.tool_calls.size())) {
            break;
        }
        ChatDelta delta;
        delta.tool_call = i;
        if (is_new) {
            delta.call.id = call.id;
            delta.call.name = call.name;
            given_.tool_calls.push_back({call.id, call.name, ""});
        }
        delta.call.arguments = rest_of(call.arguments, given_.tool_calls[i].arguments);
        given_.tool_calls[i].arguments += delta.call.arguments;
        if (is_new || !delta.call.arguments.empty()) {
            deltas.push_back(std::move(delta));
        }
    }
    return deltas;
}

}  // namespace llama_moe
