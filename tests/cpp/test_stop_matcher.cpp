#include <algorithm>
#include <string>

#include "llama_moe/text.h"
#include "test_support.h"

using llama_moe::StopMatcher;

namespace {

void check_match(const std::vector<std::string>& stops, const std::string& held, std::size_t safe, bool stopped) {
    const auto result = StopMatcher(stops).match(held);
    CHECK_EQ(result.safe, safe);
    CHECK_EQ(result.stopped, stopped);
}

// All texts of up to `size` letters of "ab".
std::vector<std::string> all_texts(std::size_t size) {
    std::vector<std::string> texts = {""};
    for (std::size_t i = 0; i < texts.size(); i++) {
        if (texts[i].size() < size) {
            texts.push_back(texts[i] + 'a');
            texts.push_back(texts[i] + 'b');
        }
    }
    return texts;
}

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

TEST_CASE("StopMatcher without stop strings calls everything safe") {
    CHECK(StopMatcher({}).empty());
    check_match({}, "any text", 8, false);
    check_match({}, "", 0, false);
}

TEST_CASE("StopMatcher finds a stop string and where it begins") {
    CHECK(!StopMatcher({"stop"}).empty());
    check_match({"stop"}, "stop", 0, true);
    check_match({"stop"}, "a stop sign", 2, true);
    check_match({"\n\n"}, "a\nb\n\nc", 3, true);
}

TEST_CASE("StopMatcher holds back what a stop string may begin in") {
    check_match({"stop"}, "abc", 3, false);
    check_match({"stop"}, "abc s", 4, false);
    check_match({"stop"}, "abc sto", 4, false);
    check_match({"stop"}, "abc stob", 8, false);
    check_match({"aab"}, "xaaa", 2, false);          // the end repeats the stop's own beginning
    check_match({"abcde", "cdx"}, "zabcd", 1, false);  // the longest of several
    check_match({"x"}, "abc", 3, false);              // one byte long: found or not
}

TEST_CASE("StopMatcher takes the stop string that is complete first") {
    check_match({"world", "hello"}, "hello world", 0, true);
    check_match({"hello", "world"}, "hello world", 0, true);
    // "b" is complete one letter before "abc": text that came letter by letter ends there, and so does any other.
    check_match({"abc", "b"}, "xabc", 2, true);
    // Both are complete at once: the longer one, which begins first.
    check_match({"bc", "abc"}, "xabc", 1, true);
}

TEST_CASE("StopMatcher agrees with its definition on all short texts over two letters") {
    const auto stops = all_texts(3);
    for (const auto& text : all_texts(7)) {
        for (std::size_t first = 1; first < stops.size(); first++) {
            for (std::size_t second = 1; second < stops.size(); second++) {
                // Reads letter by letter, as the definition says: the first end of a stop string ends the text.
                const std::vector<std::string> pair = {stops[first], stops[second]};
                std::size_t safe = 0;
                bool stopped = false;
                for (std::size_t end = 1; end <= text.size() && !stopped; end++) {
                    const std::string read = text.substr(0, end);
                    std::size_t longest = 0;
                    for (const auto& stop : pair) {
                        longest = ends_with(read, stop) ? std::max(longest, stop.size()) : longest;
                    }
                    stopped = longest > 0;
                    safe = end - longest;
                }
                if (!stopped) {
                    // The longest end of the text that is the beginning of a stop string is not safe.
                    safe = text.size();
                    for (const auto& stop : pair) {
                        for (std::size_t size = 1; size < stop.size(); size++) {
                            safe = ends_with(text, stop.substr(0, size)) ? std::min(safe, text.size() - size) : safe;
                        }
                    }
                }
                check_match(pair, text, safe, stopped);
            }
        }
    }
}
