#include "grammar_text.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "json-schema-to-grammar.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

constexpr int kMaxNesting = 200;
// What llama.cpp's parser may make of a grammar, in elements of eight bytes.
constexpr std::uint64_t kMaxElements = 4'000'000;
constexpr std::uint64_t kRuleElements = 16;  // what a rule takes besides its own
// More repetitions llama.cpp refuses, or takes as any number.
constexpr std::uint64_t kMaxRepetitions = 2'000;

// The last character of a string, set of characters, token or comment that begins at `at`.
std::size_t literal_end(const std::string& text, std::size_t at) {
    const char begin = text[at];
    const bool escapes = begin == '"' || begin == '[';
    const std::string_view ends = begin == '"' ? "\"" : begin == '[' ? "]" : begin == '<' ? ">" : "\r\n";
    for (at++; at < text.size() && ends.find(text[at]) == std::string_view::npos; at++) {
        at += escapes && text[at] == '\\' ? 1 : 0;
    }
    return at;
}

// How deep brackets are nested outside of literals, which begin with one of `literals`.
int nesting(const std::string& text, std::string_view open, std::string_view close, std::string_view literals) {
    int depth = 0;
    int deepest = 0;
    for (std::size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (literals.find(c) != std::string_view::npos) {
            i = literal_end(text, i);
        } else if (open.find(c) != std::string_view::npos) {
            deepest = std::max(deepest, ++depth);
        } else if (close.find(c) != std::string_view::npos) {
            depth--;
        }
    }
    return deepest;
}

// The largest number up to the closing brace, where `at` is left.
std::uint64_t repetitions(const std::string& text, std::size_t& at) {
    std::uint64_t most = 1;
    for (; at < text.size() && text[at] != '}'; at++) {
        if (text[at] == '#') {
            at = literal_end(text, at);
        } else if (std::isdigit(static_cast<unsigned char>(text[at])) != 0) {
            char* end = nullptr;
            most = std::max<std::uint64_t>(most, std::strtoull(text.c_str() + at, &end, 10));
            at = static_cast<std::size_t>(end - text.c_str()) - 1;
        }
    }
    return std::min(most, kMaxRepetitions);
}

// What llama.cpp's parser makes of a grammar at most: it writes x{3} as x x x, and x{0,3} as three rules.
std::uint64_t written_out(const std::string& text) {
    std::uint64_t count = 0;
    std::uint64_t item = 1;  // elements of what a repetition would repeat
    for (std::size_t i = 0; i < text.size() && count <= kMaxElements; i++) {
        const char c = text[i];
        count++;
        if (c == '"' || c == '[' || c == '<' || c == '#') {
            const std::size_t end = literal_end(text, i);
            count += end - i;
            item = c == '#' ? item : end - i;
            i = end;
        } else if (c == '{') {
            const std::uint64_t times = repetitions(text, i);
            count += times * (item + kRuleElements);
            item *= times;
        } else if (c == '*' || c == '+' || c == '?') {
            count += ++item + kRuleElements;
        } else if (std::isspace(static_cast<unsigned char>(c)) == 0) {
            count += c == '(' || c == '=' ? kRuleElements : 0;
            item = 1;
        }
    }
    return count;
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
    const int depth = nesting(text, "(", ")", "\"[<#");
    if (depth > kMaxNesting) {
        throw InvalidOptionError("grammar nests " + std::to_string(depth) + " parentheses; at most " + std::to_string(kMaxNesting) + " are supported");
    }
    if (written_out(text) > kMaxElements) {
        throw InvalidOptionError("grammar has more than " + std::to_string(kMaxElements) +
                                 " elements when its repetitions are written out; take smaller bounds, or none as in x*");
    }
}

std::string first_line(std::string text) {
    text.resize(std::min(text.find('\n'), text.size()));
    return text;
}

std::string shortened(const std::string& text) {
    return text.size() > 200 ? text.substr(0, 200) + "..." : text;
}

std::string grammar_of_schema(const std::string& schema) {
    start_backend();  // the log is captured from then on
    const NativeScope scope;
    if (nesting(schema, "{[", "}]", "\"") > kMaxNesting) {
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

}  // namespace llama_moe
