#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "grammar_rules.h"
#include "token_trie.h"

namespace llama_moe {

// A character of which some bytes are there; only well-formed ones (Unicode 15, section 3.9, table 3-7).
struct PartialCharacter {
    std::uint32_t first = 0;  // what it may become, from this
    std::uint32_t last = 0;   // to this
    std::uint32_t missing = 0;  // bytes

    // Takes the next byte, which begins a character when none is missing; false: it cannot be one.
    bool add(unsigned char byte);
    bool add(std::string_view bytes);
};

// Where a text stands in a grammar: all the ways to read it, each a stack of what must follow. Stacks share what lies below their tops,
// and equal ones are one; the sets of stacks that occur are states of an automaton, which is built as it is used. So a character takes
// time by how many different stacks there are, not by how many ways lead to them.
//
// That may still be very many. What a token may take is bounded; beyond it, any of these throws InvalidOptionError.
class GrammarMatcher {
   public:
    // With `names_tokens` a control token is the text that names it; else none is allowed.
    GrammarMatcher(GrammarRules rules, std::shared_ptr<const TokenTrie> tokens, bool names_tokens);

    // Whether the token may come next. One that ends the text may where the grammar does.
    bool allows(std::int32_t token);
    // That for every token of the vocabulary.
    std::vector<bool> allowed();
    // Goes on with a token that has this text; false: it cannot come here, and nothing can be asked any more.
    bool accept(std::int32_t token, std::string_view text);

   private:
    using Kind = GrammarRules::Kind;
    using Element = GrammarRules::Element;

    // A stack: the position of its top, and the stack below. The first node is the empty one.
    struct Node {
        std::uint32_t position;
        std::uint32_t below;
    };
    // Nodes of a state with the same element on top.
    struct Group {
        Element top;
        std::uint32_t begin;  // in state_nodes_
        std::uint32_t end;
    };
    using Row = std::array<std::uint32_t, 128>;
    struct State {
        std::uint32_t begin;  // in state_nodes_
        std::uint32_t end;
        std::uint32_t groups_begin;
        std::uint32_t groups_end;
        Row* next = nullptr;  // by ASCII character
        bool complete = false;    // the text may end here
        bool has_tokens = false;  // an element on top is a token
    };
    struct Position {
        std::uint32_t state;
        PartialCharacter partial;
    };
    void spend(std::size_t steps);
    std::uint32_t intern(std::uint32_t position, std::uint32_t below);
    std::uint32_t after(std::uint32_t node);
    Element top(std::uint32_t node) const;
    void expand();
    std::uint32_t intern_state();
    std::uint32_t step(std::uint32_t state, std::uint32_t character);
    CharacterSet::Ascii characters_like(std::uint32_t state, std::uint32_t character) const;
    std::uint32_t compute_step(std::uint32_t state, std::uint32_t character);
    bool overlaps(std::uint32_t state, const PartialCharacter& partial);
    bool advance(Position& position, unsigned char byte);
    bool advance(Position& position, std::string_view text);
    bool usable(std::int32_t token) const;
    bool may_end() const;
    void reach_behind(const Group& group, bool whole);
    bool leads_on(const Group& group, bool whole);
    void add_tokens(std::vector<bool>& allowed);
    void begin();
    void compact();
    std::size_t memory() const;

    const GrammarRules rules_;
    const std::shared_ptr<const TokenTrie> tokens_;
    const bool names_tokens_;

    std::vector<Node> nodes_;
    std::vector<std::uint32_t> node_table_;  // hash table of nodes_
    std::vector<std::uint32_t> seen_;        // by node: the last expansion that met it
    std::uint32_t expansion_ = 0;

    std::vector<State> states_;  // the first one is of no stacks
    std::vector<std::uint32_t> state_nodes_;
    std::vector<Group> groups_;
    std::deque<Row> rows_;
    std::unordered_multimap<std::uint64_t, std::uint32_t> state_table_;
    std::unordered_map<std::uint64_t, std::uint32_t> next_;  // by state and interval of characters beyond ASCII

    Position position_{};
    std::int64_t budget_ = 0;
    std::size_t compact_at_ = 0;  // bytes

    std::vector<std::uint32_t> todo_;                             // stacks to expand
    std::vector<std::pair<std::uint64_t, std::uint32_t>> reached_;  // what came of it: elements on top, and nodes
};

}  // namespace llama_moe
