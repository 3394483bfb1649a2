#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace llama_moe {

// Turns a stream of bytes into valid UTF-8: holds an incomplete character back until its last byte is there and
// replaces what cannot become one with U+FFFD, one for each maximal subpart (Unicode 15, section 3.9, table 3-8).
class Utf8Assembler {
   public:
    std::string push(std::string_view bytes);
    std::string finish();
    bool holds_bytes() const { return !held_.empty(); }
    // Whether push() would replace nothing.
    bool accepts(std::string_view bytes) const;

   private:
    std::string held_;  // at most three bytes
};

// Finds the first of several stop strings to be complete in a stream of text, across pieces.
class StopMatcher {
   public:
    explicit StopMatcher(std::vector<std::string> stops);

    struct Result {
        std::size_t safe;  // bytes from the start of the held text that no stop string can begin in any more
        bool stopped;      // the text ends at `safe`
    };
    // `held` is all the text that was not safe yet, the newest piece included.
    Result match(std::string_view held) const;
    bool empty() const { return stops_.empty(); }

   private:
    std::vector<std::string> stops_;
};

// A token with the text it adds; the texts of all pieces make the completion.
struct TextPiece {
    std::int32_t token;
    std::string text;
    std::size_t index;  // which token of the generation it is
};

// Gives every token its text once it is certain: its characters are whole and no stop string starts in it.
class TextAssembler {
   public:
    explicit TextAssembler(std::vector<std::string> stops) : matcher_(std::move(stops)) {}

    // Returns the tokens that became certain. After a stop string, `stopped()` holds and nothing more may be pushed.
    std::vector<TextPiece> push(std::int32_t token, std::string_view bytes);
    // The end of the generation: returns what was held back.
    std::vector<TextPiece> finish();
    bool stopped() const { return stopped_; }

   private:
    std::vector<TextPiece> release(std::size_t safe_bytes, bool all);

    Utf8Assembler utf8_;
    StopMatcher matcher_;
    std::deque<TextPiece> held_;
    std::string held_text_;  // the texts of held_, joined
    std::size_t next_index_ = 0;
    bool stopped_ = false;
};

}  // namespace llama_moe
