// Grammars, from a seed, of which each is small but may be read in several ways.
#pragma once

#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace test {

inline const std::vector<std::string> kGrammarCharacters = {"a", "b", "c", "1", "2", "(", ")", "\"", "{", "}", ":", ",", " ", "\n", "\u00e9", "\u65e5", "\U0001f600"};

// Rules that refer to later ones, and to themselves between brackets.
class RandomGrammar {
   public:
    explicit RandomGrammar(unsigned seed) : random_(seed) {}

    std::string operator()() {
        const unsigned rules = 1 + below(3);
        std::string text;
        for (unsigned rule = 0; rule < rules; rule++) {
            text += name(rule) + " ::= " + alternatives(rule, rules, 0) + "\n";
        }
        return text;
    }

   private:
    unsigned below(std::size_t count) { return static_cast<unsigned>(random_() % count); }
    static std::string name(unsigned rule) { return rule == 0 ? "root" : "rule-" + std::to_string(rule); }
    std::string character() { return kGrammarCharacters[below(4) == 0 ? below(kGrammarCharacters.size()) : below(3)]; }
    static std::string escaped(const std::string& character) { return character == "\n" ? "\\n" : character == "\"" ? "\\\"" : character; }

    std::string alternatives(unsigned rule, unsigned rules, int depth) {
        std::string text = sequence(rule, rules, depth);
        for (auto count = below(3); count > 0; count--) {
            text += " | " + (below(8) == 0 ? std::string("\"\"") : sequence(rule, rules, depth));
        }
        return text;
    }

    std::string sequence(unsigned rule, unsigned rules, int depth) {
        std::string text;
        for (auto count = 1 + below(3); count > 0; count--) {
            text += (text.empty() ? "" : " ") + item(rule, rules, depth) + suffix();
        }
        return text;
    }

    std::string item(unsigned rule, unsigned rules, int depth) {
        switch (below(8)) {
            case 0:
                return "[" + escaped(character()) + escaped(character()) + "]";
            case 1:
                return below(2) == 0 ? "[a-c]" : "[\u00e0-\u6fff]";
            case 2:
                return below(2) == 0 ? "[^ab]" : ".";
            case 3:
                return depth < 2 ? "(" + alternatives(rule, rules, depth + 1) + ")" : "\"a\"";
            case 4:
                return rule + 1 < rules ? name(rule + 1 + below(rules - rule - 1)) : "\"b\"";
            case 5:
                return below(3) == 0 ? "\"(\" " + name(rule) + " \")\"" : "\"c\"";
            default: {
                std::string text;
                for (auto count = 1 + below(3); count > 0; count--) {
                    text += escaped(character());
                }
                return "\"" + text + "\"";
            }
        }
    }

    std::string suffix() {
        const char* suffixes[] = {"", "", "", "", "?", "*", "+", "{2}", "{0,2}", "{1,3}", "{2,}"};
        return suffixes[below(std::size(suffixes))];
    }

    std::mt19937 random_;
};

}  // namespace test
