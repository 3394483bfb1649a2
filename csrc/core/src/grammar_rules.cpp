#include "grammar_rules.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "grammar_text.h"
#include "llama-grammar.h"  // llama.cpp's parser of GBNF, so that a grammar means what it means there
#include "llama_moe/error.h"
#include "llama_moe/log.h"

namespace llama_moe {
namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kMaxCharacter = 0x10FFFF;

bool is_end(const llama_grammar_element& element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// Sets by what is in them, so that equal ones are one.
class Sets {
   public:
    explicit Sets(std::vector<CharacterSet>& sets) : sets_(sets) {}

    // Of what llama.cpp has at `element`, which is left at the last element of it.
    std::uint32_t add(const llama_grammar_element*& element) {
        std::vector<std::pair<std::uint32_t, std::uint32_t>> key;
        const auto type = element->type;
        if (type == LLAMA_GRETYPE_CHAR_ANY) {
            key.emplace_back(0, kMaxCharacter);
        } else {
            while (true) {
                const std::uint32_t first = element->value;
                const bool range = element[1].type == LLAMA_GRETYPE_CHAR_RNG_UPPER;
                element += range ? 1 : 0;
                key.emplace_back(first, element->value);
                if (element[1].type != LLAMA_GRETYPE_CHAR_ALT) {
                    break;
                }
                element++;
            }
        }
        const bool inverse = type == LLAMA_GRETYPE_CHAR_NOT;
        const auto [known, added] = known_.emplace(std::make_pair(inverse, key), static_cast<std::uint32_t>(sets_.size()));
        if (added) {
            std::vector<CharacterSet::Range> ranges;
            for (const auto& [first, last] : key) {
                ranges.push_back({first, last});
            }
            sets_.emplace_back(std::move(ranges), inverse);
        }
        return known->second;
    }

   private:
    std::vector<CharacterSet>& sets_;
    std::map<std::pair<bool, std::vector<std::pair<std::uint32_t, std::uint32_t>>>, std::uint32_t> known_;
};

// Which rules may be empty.
std::vector<bool> nullable_rules(const GrammarRules& rules) {
    std::vector<std::vector<std::uint32_t>> uses(rules.rule_count());  // of a rule, by the rules whose alternatives have nothing but rules
    std::vector<std::pair<std::uint32_t, std::uint32_t>> alternatives; // the rule that it is of, and how many that may not be empty it has
    std::vector<bool> nullable(rules.rule_count());
    std::vector<std::uint32_t> found;
    const auto add = [&](std::uint32_t rule) {
        if (!nullable[rule]) {
            nullable[rule] = true;
            found.push_back(rule);
        }
    };
    for (std::uint32_t rule = 0; rule < rules.rule_count(); rule++) {
        for (const std::uint32_t begin : rules.alternatives(rule)) {
            std::uint32_t end = begin;
            while (rules.at(end).kind == GrammarRules::Kind::rule) {
                end++;
            }
            if (rules.at(end).kind != GrammarRules::Kind::end) {
                continue;
            }
            for (std::uint32_t at = begin; at < end; at++) {
                uses[rules.at(at).value].push_back(static_cast<std::uint32_t>(alternatives.size()));
            }
            alternatives.emplace_back(rule, end - begin);
            if (begin == end) {
                add(rule);
            }
        }
    }
    while (!found.empty()) {
        const std::uint32_t rule = found.back();
        found.pop_back();
        for (const std::uint32_t alternative : uses[rule]) {
            auto& [user, missing] = alternatives[alternative];
            if (--missing == 0) {
                add(user);
            }
        }
    }
    return nullable;
}

struct FirstRule {
    std::uint32_t rule;
    bool followed;  // by more of the alternative
};

// The rules that a rule may begin with.
std::vector<std::vector<FirstRule>> first_rules(const GrammarRules& rules) {
    const std::vector<bool> nullable = nullable_rules(rules);
    std::vector<std::vector<FirstRule>> first(rules.rule_count());
    for (std::uint32_t rule = 0; rule < rules.rule_count(); rule++) {
        for (std::uint32_t at : rules.alternatives(rule)) {
            for (; rules.at(at).kind == GrammarRules::Kind::rule; at++) {
                const std::uint32_t next = rules.at(at).value;
                first[rule].push_back({next, rules.at(at + 1).kind != GrammarRules::Kind::end});
                if (!nullable[next]) {
                    break;
                }
            }
        }
    }
    return first;
}

// Numbers the strongly connected components of a graph (Tarjan's algorithm, without recursion: chains of rules are long).
std::vector<std::uint32_t> components(const std::vector<std::vector<FirstRule>>& graph) {
    const auto count = static_cast<std::uint32_t>(graph.size());
    std::vector<std::uint32_t> component(count, kNone);
    std::vector<std::uint32_t> order(count, kNone);
    std::vector<std::uint32_t> low(count);
    std::vector<std::uint32_t> open;
    std::vector<std::pair<std::uint32_t, std::size_t>> path;  // a rule, and which of its edges is next
    std::uint32_t visited = 0;
    std::uint32_t components = 0;
    for (std::uint32_t start = 0; start < count; start++) {
        if (order[start] == kNone) {
            path.emplace_back(start, 0);
        }
        while (!path.empty()) {
            auto& [rule, edge] = path.back();
            if (edge == 0 && order[rule] == kNone) {
                order[rule] = low[rule] = visited++;
                open.push_back(rule);
            }
            if (edge < graph[rule].size()) {
                const std::uint32_t next = graph[rule][edge++].rule;
                if (order[next] == kNone) {
                    path.emplace_back(next, 0);
                } else if (component[next] == kNone) {
                    low[rule] = std::min(low[rule], order[next]);
                }
                continue;
            }
            const std::uint32_t done = rule;
            if (low[done] == order[done]) {
                std::uint32_t member = kNone;
                do {
                    member = open.back();
                    open.pop_back();
                    component[member] = components;
                } while (member != done);
                components++;
            }
            path.pop_back();
            if (!path.empty()) {
                low[path.back().first] = std::min(low[path.back().first], low[done]);
            }
        }
    }
    return component;
}

// A rule that begins with itself, directly or not, with something behind: no end of what could follow it. kNone if there is none.
std::uint32_t left_recursive_rule(const GrammarRules& rules) {
    const auto first = first_rules(rules);
    const auto component = components(first);
    for (std::uint32_t rule = 0; rule < rules.rule_count(); rule++) {
        for (const auto& next : first[rule]) {
            if (next.followed && component[next.rule] == component[rule]) {
                return rule;
            }
        }
    }
    return kNone;
}

}  // namespace

CharacterSet::CharacterSet(std::vector<Range> ranges, bool inverse) {
    ranges.erase(std::remove_if(ranges.begin(), ranges.end(), [](const Range& range) { return range.first > range.last || range.first > kMaxCharacter; }),
                 ranges.end());
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
    std::uint32_t next = 0;  // the first character that no range so far has
    const auto add = [&](std::uint32_t first, std::uint32_t last) {
        if (inverse && next < first) {
            ranges_.push_back({next, first - 1});
        } else if (!inverse && !ranges_.empty() && first <= next) {
            ranges_.back().last = std::max(ranges_.back().last, last);
        } else if (!inverse) {
            ranges_.push_back({first, last});
        }
        next = std::max(next, last + 1);
    };
    for (const auto& range : ranges) {
        add(range.first, std::min(range.last, kMaxCharacter));
    }
    if (inverse && next <= kMaxCharacter) {
        ranges_.push_back({next, kMaxCharacter});
    }
    for (const auto& range : ranges_) {
        for (std::uint32_t character = range.first; character <= range.last && character < 128; character++) {
            ascii_[character / 64] |= std::uint64_t{1} << (character % 64);
        }
    }
}

bool CharacterSet::contains(std::uint32_t character) const {
    return character < 128 ? (ascii_[character / 64] >> (character % 64) & 1) != 0 : overlaps(character, character);
}

bool CharacterSet::overlaps(std::uint32_t first, std::uint32_t last) const {
    const auto ends_before = [](const Range& range, std::uint32_t character) { return range.last < character; };
    const auto range = std::lower_bound(ranges_.begin(), ranges_.end(), first, ends_before);
    return range != ranges_.end() && range->first <= last;
}

GrammarRules::GrammarRules(const std::string& text, const llama_vocab* vocab) {
    check_grammar_size(text);
    llama_grammar_parser parser(vocab);
    {
        ErrorLog errors;
        if (!parser.parse(text.c_str()) || parser.rules.empty()) {
            throw InvalidOptionError("grammar: " + shortened(first_line(errors.text("llama.cpp gave no reason"))));
        }
    }
    const auto root = parser.symbol_ids.find("root");
    if (root == parser.symbol_ids.end()) {
        throw InvalidOptionError("grammar has no rule 'root', which is the one that the whole text must match");
    }
    root_ = root->second;

    Sets sets(sets_);
    for (const auto& rule : parser.rules) {
        first_alternatives_.push_back(static_cast<std::uint32_t>(alternatives_.size()));
        bool begins = true;
        for (const auto* element = rule.data(); element != rule.data() + rule.size(); element++) {
            if (begins) {
                alternatives_.push_back(static_cast<std::uint32_t>(elements_.size()));
            }
            begins = is_end(*element);
            switch (element->type) {
                case LLAMA_GRETYPE_END:
                case LLAMA_GRETYPE_ALT:
                    elements_.push_back({Kind::end, 0});
                    break;
                case LLAMA_GRETYPE_RULE_REF:
                    elements_.push_back({Kind::rule, element->value});
                    break;
                case LLAMA_GRETYPE_TOKEN:
                    elements_.push_back({Kind::token, element->value});
                    break;
                case LLAMA_GRETYPE_TOKEN_NOT:
                    elements_.push_back({Kind::other_token, element->value});
                    break;
                default: {
                    elements_.push_back({Kind::characters, sets.add(element)});
                    break;
                }
            }
        }
    }
    first_alternatives_.push_back(static_cast<std::uint32_t>(alternatives_.size()));
    add_boundaries();

    if (const std::uint32_t rule = left_recursive_rule(*this); rule != kNone) {
        const auto named = [rule](const auto& symbol) { return symbol.second == rule; };
        const auto symbol = std::find_if(parser.symbol_ids.begin(), parser.symbol_ids.end(), named);
        throw InvalidOptionError("grammar has left recursion: " + symbol->first +
                                 " may begin with itself; write what repeats as item (separator item)*");
    }
}

void GrammarRules::add_boundaries() {
    for (const auto& set : sets_) {
        for (const auto& range : set.ranges()) {
            boundaries_.push_back(range.first);
            boundaries_.push_back(range.last + 1);
        }
    }
    std::sort(boundaries_.begin(), boundaries_.end());
    boundaries_.erase(std::unique(boundaries_.begin(), boundaries_.end()), boundaries_.end());
    boundaries_.erase(boundaries_.begin(), std::lower_bound(boundaries_.begin(), boundaries_.end(), 128u));
}

std::uint32_t GrammarRules::interval(std::uint32_t character) const {
    return static_cast<std::uint32_t>(std::upper_bound(boundaries_.begin(), boundaries_.end(), character) - boundaries_.begin());
}

}  // namespace llama_moe
