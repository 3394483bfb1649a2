#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "llama_moe/model.h"
#include "llama_moe/sampling.h"

namespace llama_moe {

// What a chat template is applied to. JSON is of the OpenAI API's shape.
struct ChatRequest {
    std::string messages;  // JSON
    std::string tools;     // JSON; empty: none
    std::string tool_choice = "auto";  // or "none" or "required"
    bool parallel_tool_calls = false;
    std::string json_schema;  // of the answer; empty: any text
    bool enable_thinking = true;
    bool add_generation_prompt = true;
    bool continue_final_message = false;              // the answer goes on with the last message
    std::map<std::string, std::string> template_options;  // further variables for the template, each as JSON
};

struct ChatToolCall {
    std::string id;
    std::string name;
    std::string arguments;  // JSON, unless the output ended early
};

struct ChatMessage {
    std::string content;
    std::string reasoning;
    std::vector<ChatToolCall> tool_calls;
};

// What a message gained. Id and name come once for each tool call, ahead of its arguments.
struct ChatDelta {
    std::string content;
    std::string reasoning;
    std::optional<std::size_t> tool_call;  // index of the one that `call` adds to
    ChatToolCall call;
};

struct ChatSyntax;  // how the model writes reasoning and tool calls

// A prompt, and what its template says of the answer.
struct ChatPrompt {
    std::string text;
    std::vector<std::string> stop;
    ChatGrammar grammar;
    std::optional<std::string> json_schema;  // binds when there is no grammar
    std::vector<std::int32_t> preserved_tokens;
    std::shared_ptr<const ChatSyntax> syntax;

    // The options with what the template asks for.
    SamplingOptions constrain(SamplingOptions options) const;
};

// A model's chat format, or that of another Jinja template. Any thread may use it.
class ChatTemplate {
   public:
    // `text`: used in place of the model's own. Throws InvalidOptionError.
    static std::shared_ptr<ChatTemplate> create(const std::shared_ptr<Model>& model, const std::optional<std::string>& text);
    ~ChatTemplate();

    // Throws InvalidOptionError with the template's own message when it refuses the messages.
    ChatPrompt apply(const ChatRequest& request) const;
    // What it knows of, such as "supports_tools".
    std::map<std::string, bool> capabilities() const;

   private:
    struct Native;
    ChatTemplate(std::shared_ptr<Model> model, std::unique_ptr<Native> native);

    std::shared_ptr<Model> model_;
    std::unique_ptr<Native> native_;
    mutable std::mutex mutex_;
};

// Reads an answer as it comes. Output that is not what the template's format promises is content, never an error.
class ChatParser {
   public:
    explicit ChatParser(std::shared_ptr<const ChatSyntax> syntax);
    ~ChatParser();

    std::vector<ChatDelta> push(const std::string& text);
    // The end of the output: what was held back.
    std::vector<ChatDelta> finish();
    // What was read so far; after finish(), the whole message.
    const ChatMessage& message() const { return message_; }

   private:
    std::optional<ChatMessage> parse(bool partial) const;
    std::vector<ChatDelta> advance(ChatMessage parsed, bool last);

    std::shared_ptr<const ChatSyntax> syntax_;
    std::string text_;
    std::size_t parsed_size_ = 0;  // of the text when it was last parsed
    bool finished_ = false;
    ChatMessage prefill_;  // what of the message was in the prompt already
    ChatMessage message_;
    ChatMessage given_;  // what the deltas so far add up to
};

}  // namespace llama_moe
