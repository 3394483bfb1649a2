#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "grammar_matcher.h"
#include "grammar_trigger.h"
#include "llama-cpp.h"
#include "llama_moe/sampling.h"
#include "token_trie.h"

namespace llama_moe {

// What the next token may be, given those before it. What it says is well-formed text, of control tokens only those that count.
class Grammar {
   public:
    // `tokens`: the texts of `vocab`. With `names_tokens` control tokens count as the text that names them, as a chat template has it;
    // else they have none and are not allowed. Throws InvalidOptionError when the grammar is no good. So do the others, when it can be
    // read in too many ways.
    Grammar(const ChatGrammar& grammar, const llama_vocab* vocab, std::shared_ptr<const TokenTrie> tokens, bool names_tokens);

    // False while a lazy grammar waits for its trigger, and inside of the model's thinking.
    bool applies() const;
    bool allows(std::int32_t token);
    // Takes out what is not allowed; the order stays.
    void filter(std::vector<llama_token_data>& candidates);
    void accept(std::int32_t token);

   private:
    bool thinking() const;
    void advance(std::int32_t token);

    std::shared_ptr<const TokenTrie> tokens_;
    std::optional<GrammarMatcher> matcher_;  // empty: nothing is forbidden any more
    std::optional<GrammarTrigger> trigger_;  // until a lazy grammar begins
    llama_sampler_ptr thinking_;             // follows the thinking tags; only with a lazy grammar
    bool lazy_;
};

}  // namespace llama_moe
