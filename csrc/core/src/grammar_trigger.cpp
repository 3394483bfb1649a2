#include "grammar_trigger.h"

#include <algorithm>

#include "llama-grammar.h"  // how llama.cpp looks for a trigger: what chat templates ask for is made for that

namespace llama_moe {

struct GrammarTrigger::Patterns {
    std::vector<llama_grammar_trigger_pattern> list;
};

GrammarTrigger::GrammarTrigger(const std::vector<std::string>& patterns, std::vector<std::int32_t> tokens) : tokens_(std::move(tokens)) {
    auto compiled = std::make_unique<Patterns>();
    for (const auto& pattern : patterns) {
        compiled->list.push_back({pattern, std::regex(pattern)});
    }
    patterns_ = std::move(compiled);
}

GrammarTrigger::~GrammarTrigger() = default;
GrammarTrigger::GrammarTrigger(GrammarTrigger&&) noexcept = default;
GrammarTrigger& GrammarTrigger::operator=(GrammarTrigger&&) noexcept = default;

std::optional<GrammarTrigger::Pieces> GrammarTrigger::add(std::int32_t token, const std::string& text) {
    if (std::find(tokens_.begin(), tokens_.end(), token) != tokens_.end()) {
        return Pieces{{token, text}};
    }
    seen_.emplace_back(token, text_.size());
    text_ += text;
    std::size_t begin = std::string::npos;
    for (const auto& pattern : patterns_->list) {
        begin = pattern.find(text_);
        if (begin != std::string::npos) {
            break;
        }
    }
    if (begin == std::string::npos) {
        return std::nullopt;
    }
    Pieces pieces;
    for (std::size_t i = 0; i < seen_.size(); i++) {
        const auto [piece, first] = seen_[i];
        const std::size_t end = i + 1 < seen_.size() ? seen_[i + 1].second : text_.size();
        if (end > begin) {
            const std::size_t from = std::max(first, begin);
            pieces.emplace_back(piece, text_.substr(from, end - from));
        }
    }
    return pieces;
}

}  // namespace llama_moe
