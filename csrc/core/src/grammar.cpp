#include "grammar.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <string_view>

#include "json-schema-to-grammar.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_thread.h"
#include "reasoning-budget.h"

namespace llama_moe {
namespace {

constexpr int kMaxNesting = 200;
constexpr int kMaxRules = 10'000;
constexpr float kForbidden = -INFINITY;

// How deep brackets are nested outside of literals, each of which goes from one character of `begin` to its own of `end`. One that
// goes to the end of the line, a comment, knows no escapes and may end with a carriage return.
int nesting(const std::string& text, std::string_view open, std::string_view close, std::string_view begin, std::string_view end) {
    int depth = 0;
    int deepest = 0;
    char literal_end = 0;
    for (std::size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (literal_end != 0) {
            const bool comment = literal_end == '\n';
            i += c == '\\' && !comment ? 1 : 0;
            literal_end = c == literal_end || (comment && c == '\r') ? '\0' : literal_end;
        } else if (const auto at = begin.find(c); at != std::string_view::npos) {
            literal_end = end[at];
        } else if (open.find(c) != std::string_view::npos) {
            deepest = std::max(deepest, ++depth);
        } else if (close.find(c) != std::string_view::npos) {
            depth--;
        }
    }
    return deepest;
}

// llama.cpp's messages go on with the rest of the grammar.
std::string first_line(std::string text) {
    text.resize(std::min(text.find('\n'), text.size()));
    return text;
}

std::string shortened(const std::string& text) {
    return text.size() > 200 ? text.substr(0, 200) + "..." : text;
}

// Where JSON Schema has a schema, true means that anything goes; llama.cpp's conversion knows that as {}.
void replace_true_schemas(common_json& schema) {
    if (schema.is_boolean() && schema == true) {
        schema = common_json::object();
    }
    if (!schema.is_object()) {
        return;
    }
    constexpr std::array kOfNames = {"properties", "$defs", "definitions"};
    constexpr std::array kOfOne = {"items", "prefixItems", "anyOf", "oneOf", "allOf"};
    for (const char* key : kOfNames) {
        if (schema.contains(key) && schema.at(key).is_object()) {
            for (const auto& [name, child] : schema.at(key).items()) {
                replace_true_schemas(child);
            }
        }
    }
    for (const char* key : kOfOne) {
        if (!schema.contains(key)) {
            continue;
        }
        auto& value = schema.at(key);
        if (!value.is_array()) {
            replace_true_schemas(value);
            continue;
        }
        for (std::size_t i = 0; i < value.size(); i++) {
            replace_true_schemas(value.at(i));
        }
    }
}

}  // namespace

void check_grammar_size(const std::string& text) {
    if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
        throw InvalidOptionError("grammar is empty; it must have a rule such as 'root ::= \"yes\" | \"no\"', or be None");
    }
    if (text.find('\0') != std::string::npos) {
        throw InvalidOptionError("grammar has a NUL character; write it as \\x00");
    }
    const int depth = nesting(text, "(", ")", "\"[#", "\"]\n");
    if (depth > kMaxNesting) {
        throw InvalidOptionError("grammar nests " + std::to_string(depth) + " parentheses; at most " + std::to_string(kMaxNesting) + " are supported");
    }
    int rules = 0;
    for (std::size_t at = text.find("::="); at != std::string::npos; at = text.find("::=", at + 3)) {
        rules++;
    }
    if (rules > kMaxRules) {
        throw InvalidOptionError("grammar has " + std::to_string(rules) + " rules; at most " + std::to_string(kMaxRules) + " are supported");
    }
}

std::string grammar_of_schema(const std::string& schema) {
    start_backend();  // the log is captured from then on
    const NativeScope scope;
    if (nesting(schema, "{[", "}]", "\"", "\"") > kMaxNesting) {
        throw InvalidOptionError("json_schema is nested deeper than " + std::to_string(kMaxNesting) + " levels");
    }
    ErrorLog incomplete;
    std::string grammar;
    try {
        common_json json = common_json::parse(schema);
        replace_true_schemas(json);
        grammar = json_schema_to_grammar(json, /*force_gbnf=*/true);
    } catch (const common_json_error& error) {
        throw InvalidOptionError("json_schema is not JSON: " + first_line(error.what()) + "; it begins with " + shortened(schema));
    } catch (const NativeAbort&) {
        throw;
    } catch (const std::exception& error) {
        std::string reason = error.what();
        std::replace(reason.begin(), reason.end(), '\n', ' ');
        throw InvalidOptionError("json_schema: " + shortened(reason));
    }
    if (auto reason = incomplete.text(""); !reason.empty()) {
        const auto colon = reason.find("incomplete: ");
        reason.erase(0, colon == std::string::npos ? 0 : colon + 12);
        throw InvalidOptionError("json_schema has what cannot be enforced: " + shortened(reason));
    }
    return grammar;
}

Grammar::Grammar(const ChatGrammar& grammar, const llama_vocab* vocab, bool names_tokens)
    : vocab_(vocab), names_tokens_(names_tokens), lazy_(grammar.lazy) {
    check_grammar_size(grammar.text);
    ErrorLog errors;
    try {
        if (grammar.lazy) {
            std::vector<const char*> patterns;
            for (const auto& pattern : grammar.trigger_patterns) {
                patterns.push_back(pattern.c_str());
            }
            grammar_.reset(llama_sampler_init_grammar_lazy_patterns(vocab, grammar.text.c_str(), "root", patterns.data(), patterns.size(),
                                                                    grammar.trigger_tokens.data(), grammar.trigger_tokens.size()));
        } else {
            grammar_.reset(llama_sampler_init_grammar(vocab, grammar.text.c_str(), "root"));
        }
    } catch (const NativeAbort&) {
        throw;
    } catch (const std::exception& error) {
        throw InvalidOptionError("grammar: " + shortened(error.what()));
    }
    if (!grammar_) {
        throw InvalidOptionError("grammar: " + shortened(first_line(errors.text("llama.cpp gave no reason"))));
    }
    if (!lazy_) {
        for (const auto token : grammar.prefill) {
            advance(token);
        }
    } else if (!grammar.thinking_start.empty() && !grammar.thinking_end.empty()) {
        thinking_.reset(common_reasoning_budget_init(vocab, {grammar.thinking_start}, grammar.thinking_end, {}, INT_MAX));
        for (const auto token : grammar.prefill) {
            llama_sampler_accept(thinking_.get(), token);
        }
    }
}

bool Grammar::thinking() const {
    if (!thinking_) {
        return false;
    }
    const auto state = common_reasoning_budget_get_state(thinking_.get());
    return state != REASONING_BUDGET_IDLE && state != REASONING_BUDGET_DONE;
}

bool Grammar::applies() const {
    return grammar_ != nullptr && !thinking();
}

std::string Grammar::text_of(std::int32_t token) const {
    std::string text(32, '\0');
    auto size = llama_token_to_piece(vocab_, token, text.data(), static_cast<std::int32_t>(text.size()), 0, names_tokens_);
    if (size < 0) {
        text.resize(static_cast<std::size_t>(-size));
        size = llama_token_to_piece(vocab_, token, text.data(), -size, 0, names_tokens_);
    }
    text.resize(static_cast<std::size_t>(std::max(size, 0)));
    return text;
}

// llama.cpp's grammars also take ill-formed UTF-8, such as a character in more bytes than it needs, and control tokens by their
// names. Neither would be in the output as the grammar has it.
bool Grammar::is_text(std::int32_t token) const {
    if (lazy_ || llama_vocab_is_eog(vocab_, token)) {
        return true;
    }
    const std::string text = text_of(token);
    return !text.empty() && utf8_.accepts(text);
}

bool Grammar::allows(std::int32_t token) const {
    llama_token_data candidate{token, 1.0f, 0.0f};
    llama_token_data_array array{&candidate, 1, -1, false};
    llama_sampler_apply(grammar_.get(), &array);
    return candidate.logit != kForbidden && is_text(token);
}

void Grammar::filter(std::vector<llama_token_data>& candidates) const {
    llama_token_data_array array{candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(grammar_.get(), &array);
    const auto forbidden = [this](const llama_token_data& candidate) { return candidate.logit == kForbidden || !is_text(candidate.id); };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), forbidden), candidates.end());
}

void Grammar::accept(std::int32_t token) {
    const bool was_thinking = thinking();
    if (thinking_) {
        llama_sampler_accept(thinking_.get(), token);
    }
    if (!was_thinking) {
        advance(token);
    } else if (!thinking()) {
        // The end of the thinking may be a trigger.
        if (const auto* end = common_reasoning_budget_get_end_match(thinking_.get())) {
            for (const auto end_token : *end) {
                advance(end_token);
            }
        }
    }
}

void Grammar::advance(std::int32_t token) {
    if (!grammar_) {
        return;
    }
    if (!lazy_ && !llama_vocab_is_eog(vocab_, token)) {
        utf8_.push(text_of(token));
    }
    try {
        llama_sampler_accept(grammar_.get(), token);
    } catch (const NativeAbort&) {
        throw;
    } catch (const std::exception& error) {
        if (!lazy_) {
            throw InvalidOptionError(std::string("grammar: ") + error.what());
        }
        // The token that has the trigger went on with what cannot follow it. What comes now is text.
        grammar_.reset();
    }
}

}  // namespace llama_moe
