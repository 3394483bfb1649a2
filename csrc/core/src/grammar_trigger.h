#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace llama_moe {

// Waits for where a lazy grammar begins.
class GrammarTrigger {
   public:
    // Throws std::regex_error.
    GrammarTrigger(const std::vector<std::string>& patterns, std::vector<std::int32_t> tokens);
    ~GrammarTrigger();
    GrammarTrigger(GrammarTrigger&&) noexcept;
    GrammarTrigger& operator=(GrammarTrigger&&) noexcept;

    using Pieces = std::vector<std::pair<std::int32_t, std::string>>;
    // Takes the next token and its text; when that makes a trigger complete, returns what the grammar begins with: tokens, of the
    // first of them maybe a part of the text. It is not to be asked again then.
    std::optional<Pieces> add(std::int32_t token, const std::string& text);

   private:
    struct Patterns;

    std::unique_ptr<const Patterns> patterns_;
    std::vector<std::int32_t> tokens_;
    std::string text_;
    std::vector<std::pair<std::int32_t, std::size_t>> seen_;  // tokens, and where their texts begin in text_
};

}  // namespace llama_moe
