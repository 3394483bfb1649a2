// A UTF-8 decoder of its own for the tests, written from Unicode 15's table 3-7 of well-formed byte sequences rather than
// from what it checks.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace test {

// Decodes all of `bytes` at once. Each maximal subpart of an ill-formed sequence (section 3.9, definition D93b and
// "U+FFFD Substitution of Maximal Subparts") becomes one U+FFFD.
inline std::string decode_utf8(std::string_view bytes) {
    using Range = std::pair<int, int>;
    // Table 3-7: the ranges of the first, second, third and fourth byte.
    static const std::vector<std::vector<Range>> rows = {
        {{0x00, 0x7F}},
        {{0xC2, 0xDF}, {0x80, 0xBF}},
        {{0xE0, 0xE0}, {0xA0, 0xBF}, {0x80, 0xBF}},
        {{0xE1, 0xEC}, {0x80, 0xBF}, {0x80, 0xBF}},
        {{0xED, 0xED}, {0x80, 0x9F}, {0x80, 0xBF}},
        {{0xEE, 0xEF}, {0x80, 0xBF}, {0x80, 0xBF}},
        {{0xF0, 0xF0}, {0x90, 0xBF}, {0x80, 0xBF}, {0x80, 0xBF}},
        {{0xF1, 0xF3}, {0x80, 0xBF}, {0x80, 0xBF}, {0x80, 0xBF}},
        {{0xF4, 0xF4}, {0x80, 0x8F}, {0x80, 0xBF}, {0x80, 0xBF}},
    };
    std::string text;
    std::size_t at = 0;
    while (at < bytes.size()) {
        std::size_t longest = 0;  // longest beginning of any row
        bool whole = false;
        for (const auto& row : rows) {
            std::size_t matched = 0;
            while (matched < row.size() && at + matched < bytes.size()) {
                const int byte = static_cast<unsigned char>(bytes[at + matched]);
                if (byte < row[matched].first || byte > row[matched].second) {
                    break;
                }
                matched++;
            }
            if (matched > longest) {
                longest = matched;
                whole = matched == row.size();
            }
        }
        text += whole ? std::string(bytes.substr(at, longest)) : "\xEF\xBF\xBD";
        at += longest == 0 ? 1 : longest;
    }
    return text;
}

}  // namespace test
