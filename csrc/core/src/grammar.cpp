#include "grammar.h"

#include <algorithm>
#include <climits>
#include <regex>
#include <utility>

#include "grammar_text.h"
#include "llama_moe/error.h"
#include "reasoning-budget.h"

namespace llama_moe {
namespace {

// Asking about this many tokens, one by one, takes as long as asking about all of the vocabulary at once, or less.
constexpr std::size_t kFew = 1024;

}  // namespace

Grammar::Grammar(const ChatGrammar& grammar, const llama_vocab* vocab, std::shared_ptr<const TokenTrie> tokens, bool names_tokens)
    : tokens_(std::move(tokens)), lazy_(grammar.lazy) {
    matcher_.emplace(GrammarRules(grammar.text, vocab), tokens_, names_tokens);
    if (!lazy_) {
        for (const auto token : grammar.prefill) {
            advance(token);
        }
        return;
    }
    try {
        trigger_.emplace(grammar.trigger_patterns, grammar.trigger_tokens);
    } catch (const std::regex_error& error) {
        throw InvalidOptionError(std::string("grammar: a trigger is no regular expression: ") + error.what());
    }
    if (!grammar.thinking_start.empty() && !grammar.thinking_end.empty()) {
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
    return matcher_ && !trigger_ && !thinking();
}

bool Grammar::allows(std::int32_t token) {
    return matcher_->allows(token);
}

void Grammar::filter(std::vector<llama_token_data>& candidates) {
    const bool few = candidates.size() <= kFew;
    const std::vector<bool> allowed = few ? std::vector<bool>() : matcher_->allowed();
    const auto forbidden = [&](const llama_token_data& candidate) {
        return few ? !matcher_->allows(candidate.id) : !allowed[static_cast<std::size_t>(candidate.id)];
    };
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
    if (!matcher_) {
        return;
    }
    GrammarTrigger::Pieces pieces{{token, std::string(tokens_->text(token))}};
    if (trigger_) {
        auto begun = trigger_->add(token, pieces.front().second);
        if (!begun) {
            return;
        }
        pieces = std::move(*begun);
        trigger_.reset();
    }
    for (const auto& [piece, text] : pieces) {
        if (matcher_->accept(piece, text)) {
            continue;
        }
        if (!lazy_) {
            throw InvalidOptionError("grammar: the text cannot go on with '" + text + "'");
        }
        // The token that has the trigger went on with what cannot follow it. What comes now is text.
        matcher_.reset();
        return;
    }
}

}  // namespace llama_moe
