#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama-cpp.h"
#include "llama_moe/sampling.h"
#include "llama_moe/text.h"

namespace llama_moe {

// Refuses a grammar that llama.cpp's parser, which recurses, has no stack for.
void check_grammar_size(const std::string& text);

// A grammar for the JSON that a schema, given as text, describes. Throws InvalidOptionError.
std::string grammar_of_schema(const std::string& schema);

// What the next token may be, given those before it.
class Grammar {
   public:
    // `names_tokens`: control tokens count as the text that names them, as a chat template has it; else they have none and are
    // not allowed. Throws InvalidOptionError with llama.cpp's reason when the grammar is no good.
    Grammar(const ChatGrammar& grammar, const llama_vocab* vocab, bool names_tokens);

    // False while a lazy grammar waits for its trigger inside of the model's thinking.
    bool applies() const;
    bool allows(std::int32_t token) const;
    // Takes out what is not allowed; the order stays.
    void filter(std::vector<llama_token_data>& candidates) const;
    void accept(std::int32_t token);

   private:
    bool thinking() const;
    bool is_text(std::int32_t token) const;
    std::string text_of(std::int32_t token) const;
    void advance(std::int32_t token);

    const llama_vocab* vocab_;
    bool names_tokens_;
    Utf8Assembler utf8_;
    llama_sampler_ptr grammar_;   // empty: nothing is forbidden any more
    llama_sampler_ptr thinking_;  // follows the thinking tags; only with a lazy grammar
    bool lazy_;
};

}  // namespace llama_moe
