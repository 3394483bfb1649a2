#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "llama-cpp.h"

namespace llama_moe {

// Characters that may stand in one place.
class CharacterSet {
   public:
    struct Range {
        std::uint32_t first;
        std::uint32_t last;
    };
    // `ranges` in any order; those that end before they begin have no characters.
    CharacterSet(std::vector<Range> ranges, bool inverse);

    bool contains(std::uint32_t character) const;
    bool overlaps(std::uint32_t first, std::uint32_t last) const;
    const std::vector<Range>& ranges() const { return ranges_; }
    using Ascii = std::array<std::uint64_t, 2>;  // a bit for each character
    const Ascii& ascii() const { return ascii_; }

   private:
    std::vector<Range> ranges_;  // in order, with gaps between them
    Ascii ascii_{};
};

// A grammar, read and checked.
class GrammarRules {
   public:
    enum class Kind : std::uint32_t { end, rule, characters, token, other_token };
    struct Element {
        Kind kind;
        std::uint32_t value;  // the rule, the set of characters, the token, or the only token that it is not
    };

    // Throws InvalidOptionError: when llama.cpp's parser does, when there is no root, and for left recursion.
    GrammarRules(const std::string& text, const llama_vocab* vocab);

    std::uint32_t root() const { return root_; }
    // Alternatives follow one another, each ended by Kind::end; a position is an index into all of them.
    const Element& at(std::uint32_t position) const { return elements_[position]; }
    struct Positions {
        const std::uint32_t* first;
        const std::uint32_t* last;
        const std::uint32_t* begin() const { return first; }
        const std::uint32_t* end() const { return last; }
    };
    // Where a rule's alternatives begin.
    Positions alternatives(std::uint32_t rule) const {
        return {alternatives_.data() + first_alternatives_[rule], alternatives_.data() + first_alternatives_[rule + 1]};
    }
    std::uint32_t rule_count() const { return static_cast<std::uint32_t>(first_alternatives_.size()) - 1; }
    const CharacterSet& set(std::uint32_t index) const { return sets_[index]; }
    // Characters beyond ASCII between two of these are in the same sets: the number of these up to `character`.
    std::uint32_t interval(std::uint32_t character) const;

   private:
    void add_boundaries();

    std::uint32_t root_ = 0;
    std::vector<Element> elements_;
    std::vector<std::uint32_t> alternatives_;
    std::vector<std::uint32_t> first_alternatives_;  // in alternatives_, by rule
    std::vector<CharacterSet> sets_;
    std::vector<std::uint32_t> boundaries_;
};

}  // namespace llama_moe
