#pragma once

#include <string>

namespace llama_moe {

// Refuses a grammar that llama.cpp's parser, which recurses and writes repetitions out, has no stack or memory for.
void check_grammar_size(const std::string& text);

// A grammar for the JSON that a schema, given as text, describes. Throws InvalidOptionError.
std::string grammar_of_schema(const std::string& schema);

// For messages: llama.cpp's go on with the rest of the grammar.
std::string first_line(std::string text);
std::string shortened(const std::string& text);

}  // namespace llama_moe
