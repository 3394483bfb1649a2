#include <algorithm>
#include <random>
#include <string>

#include "llama_moe/text.h"
#include "test_support.h"
#include "utf8_reference.h"

using llama_moe::TextAssembler;
using llama_moe::TextPiece;

namespace {

struct Assembled {
    std::vector<TextPiece> pieces;
    std::size_t pushed = 0;  // tokens until a stop string, or all
    bool stopped = false;

    std::string text() const {
        std::string joined;
        for (const auto& piece : pieces) {
            joined += piece.text;
        }
        return joined;
    }
};

// Pushes tokens numbered from 100 as an engine does: until a stop string, else to the end.
Assembled assemble(const std::vector<std::string>& stops, const std::vector<std::string>& tokens) {
    TextAssembler assembler(stops);
    Assembled result;
    const auto add = [&](std::vector<TextPiece> pieces) {
        for (auto& piece : pieces) {
            result.pieces.push_back(std::move(piece));
        }
    };
    for (const auto& bytes : tokens) {
        add(assembler.push(static_cast<std::int32_t>(100 + result.pushed), bytes));
        result.pushed++;
        if (assembler.stopped()) {
            break;
        }
    }
    if (!assembler.stopped()) {
        add(assembler.finish());
    }
    CHECK(assembler.finish().empty());
    result.stopped = assembler.stopped();
    return result;
}

std::vector<std::string> texts(const std::vector<TextPiece>& pieces) {
    std::vector<std::string> result;
    for (const auto& piece : pieces) {
        result.push_back(piece.text);
    }
    return result;
}

// Where the stop string that is complete first begins; npos: none does.
std::size_t first_stop(const std::string& text, const std::vector<std::string>& stops) {
    for (std::size_t end = 1; end <= text.size(); end++) {
        std::size_t begin = std::string::npos;
        for (const auto& stop : stops) {
            if (stop.size() <= end && text.compare(end - stop.size(), stop.size(), stop) == 0) {
                begin = std::min(begin, end - stop.size());
            }
        }
        if (begin != std::string::npos) {
            return begin;
        }
    }
    return std::string::npos;
}

std::vector<std::string> random_split(const std::string& bytes, std::mt19937& random) {
    std::vector<std::string> tokens;
    for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t size = std::min<std::size_t>(random() % 5, bytes.size() - at);  // a token may have no bytes
        tokens.push_back(bytes.substr(at, size));
        at += size;
    }
    return tokens;
}

void check_pieces(const Assembled& result, const std::string& expected, std::size_t token_count) {
    CHECK_EQ(result.text(), expected);
    for (std::size_t i = 0; i < result.pieces.size(); i++) {
        CHECK_EQ(result.pieces[i].index, i);
        CHECK_EQ(result.pieces[i].token, static_cast<std::int32_t>(100 + i));
    }
    if (!result.stopped) {
        CHECK_EQ(result.pieces.size(), token_count);  // each token is given out, with text or without
    }
}

}  // namespace

TEST_CASE("TextAssembler gives each token its text at once when nothing is uncertain") {
    TextAssembler assembler({});
    CHECK_EQ(texts(assembler.push(7, "Hello")), std::vector<std::string>{"Hello"});
    CHECK_EQ(texts(assembler.push(8, " world")), std::vector<std::string>{" world"});
    CHECK(assembler.finish().empty());
    CHECK(!assembler.stopped());
}

TEST_CASE("TextAssembler holds a token back until its characters are whole") {
    TextAssembler assembler({});
    CHECK(assembler.push(1, "\xE2\x82").empty());
    const auto pieces = assembler.push(2, "\xAC!");
    CHECK_EQ(texts(pieces), (std::vector<std::string>{"", "\xE2\x82\xAC!"}));
    CHECK_EQ(pieces.at(0).token, 1);
    CHECK_EQ(pieces.at(1).index, 1u);
}

TEST_CASE("TextAssembler gives the last token the replacement of a character that never ended") {
    TextAssembler assembler({});
    CHECK_EQ(texts(assembler.push(1, "a")), std::vector<std::string>{"a"});
    CHECK(assembler.push(2, "b\xE2").empty());
    CHECK_EQ(texts(assembler.finish()), std::vector<std::string>{"b\xEF\xBF\xBD"});
}

TEST_CASE("TextAssembler cuts the text at a stop string across tokens") {
    TextAssembler assembler({"<end>"});
    CHECK_EQ(texts(assembler.push(1, "one ")), std::vector<std::string>{"one "});
    CHECK(assembler.push(2, "two<").empty());
    CHECK(assembler.push(3, "en").empty());
    CHECK_EQ(texts(assembler.push(4, "d> three")), std::vector<std::string>{"two"});
    CHECK(assembler.stopped());
    CHECK(assembler.finish().empty());
}

TEST_CASE("TextAssembler gives out what only looked like a stop string") {
    TextAssembler assembler({"<end>"});
    CHECK(assembler.push(1, "<e").empty());
    CHECK_EQ(texts(assembler.push(2, "gg")), (std::vector<std::string>{"<e", "gg"}));
    CHECK(assembler.push(3, "<en").empty());
    CHECK_EQ(texts(assembler.finish()), std::vector<std::string>{"<en"});
    CHECK(!assembler.stopped());
}

TEST_CASE("TextAssembler finds a stop string that the end's replacement character completes") {
    const auto result = assemble({"!\xEF\xBF\xBD"}, {"a", "!", "\xE2\x82"});
    CHECK_EQ(result.text(), "a");
    CHECK(result.stopped);
}

TEST_CASE("TextAssembler without stop strings loses nothing of random bytes in random tokens") {
    std::mt19937 random(2);
    for (int round = 0; round < 20'000; round++) {
        std::string bytes;
        for (auto count = random() % 12; count > 0; count--) {
            static const std::vector<std::string> parts = {"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xE2", "\xF0\x9F", "\x80", "\xFF"};
            bytes += parts[random() % parts.size()];
        }
        const auto tokens = random_split(bytes, random);
        check_pieces(assemble({}, tokens), test::decode_utf8(bytes), tokens.size());
    }
}

TEST_CASE("TextAssembler ends random texts at the first of random stop strings, however they are split") {
    std::mt19937 random(3);
    static const std::vector<std::string> letters = {"a", "b", "c", "\xC3\xA9", "\xE2\x82\xAC", "\xE2"};
    const auto random_text = [&](std::size_t size) {
        std::string text;
        for (; size > 0; size--) {
            text += letters[random() % letters.size()];
        }
        return text;
    };
    int with_stop = 0;
    for (int round = 0; round < 40'000; round++) {
        const std::string bytes = random_text(random() % 16);
        const std::string text = test::decode_utf8(bytes);
        std::vector<std::string> stops;
        for (auto count = 1 + random() % 3; count > 0; count--) {
            stops.push_back(test::decode_utf8(random_text(1 + random() % 4)));
        }
        const std::size_t stop = first_stop(text, stops);
        const auto tokens = random_split(bytes, random);
        const auto result = assemble(stops, tokens);
        CHECK_EQ(result.stopped, stop != std::string::npos);
        check_pieces(result, text.substr(0, stop), tokens.size());
        with_stop += result.stopped ? 1 : 0;
    }
    CHECK(with_stop > 10'000 && with_stop < 30'000);  // both kinds were tried
}

TEST_CASE("TextAssembler gives out text as soon as no stop string can begin in it") {
    std::mt19937 random(4);
    const std::vector<std::string> stops = {"abab", "bb", "caa"};
    for (int round = 0; round < 5'000; round++) {
        TextAssembler assembler(stops);
        std::string text;
        std::string given;
        for (std::int32_t token = 0; token < 12 && !assembler.stopped(); token++) {
            const char letter = static_cast<char>('a' + random() % 3);
            text += letter;
            for (const auto& piece : assembler.push(token, std::string(1, letter))) {
                given += piece.text;
            }
            // With one letter a token, exactly the longest end that begins a stop string is held.
            std::size_t held = 0;
            for (const auto& stop : stops) {
                for (std::size_t size = 1; size < stop.size() && size <= text.size(); size++) {
                    held = text.compare(text.size() - size, size, stop, 0, size) == 0 ? std::max(held, size) : held;
                }
            }
            if (!assembler.stopped()) {
                CHECK_EQ(given, text.substr(0, text.size() - held));
            }
        }
    }
}
