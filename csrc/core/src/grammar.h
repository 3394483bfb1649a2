#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama-cpp.h"
#include "llama_moe/sampling.h"

namespace llama_moe {

// Refuses a grammar that llama.cpp's parser, which recurses, has no stack for.
void check_grammar_size(const std::string& text);

// A grammar for the JSON that a schema, given as text, describes. Throws InvalidOptionError.
std::string grammar_of_schema(const std::string& schema);

// What the next token may be, given those before it.
class Grammar {
   public:
    // Throws InvalidOptionError with llama.cpp's reason when the grammar is no good.
    Grammar(const ChatGrammar& grammar, const llama_vocab* vocab);

    // False while a lazy grammar waits for its trigger inside of the model's thinking.
    bool applies() const;
    bool allows(std::int32_t token) const;
    // Takes out what is not allowed; the order stays.
    void filter(std::vector<llama_token_data>& candidates) const;
    void accept(std::int32_t token);

   private:
    bool thinking() const;
    void advance(std::int32_t token);

    llama_sampler_ptr grammar_;   // empty: nothing is forbidden any more
    llama_sampler_ptr thinking_;  // follows the thinking tags; only with a lazy grammar
    bool lazy_;
};

}  // namespace llama_moe
