#include <random>
#include <string>

#include "llama_moe/text.h"
#include "test_support.h"
#include "utf8_reference.h"

using llama_moe::Utf8Assembler;

namespace {

const std::string kReplacement = "\xEF\xBF\xBD";

std::string assemble(const std::vector<std::string>& pieces) {
    Utf8Assembler assembler;
    std::string text;
    for (const auto& piece : pieces) {
        text += assembler.push(piece);
    }
    return text + assembler.finish();
}

// Random bytes that are often nearly UTF-8: whole characters, cut ones, stray continuation bytes and any byte.
std::string random_bytes(std::mt19937& random) {
    static const std::vector<std::string> parts = {
        "a", "\n", std::string(1, '\0'), "\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF",
        "\xF0\x90\x80\x80", "\xF0\x9F\x98\x80", "\xF4\x8F\xBF\xBF", "\xC0\xAF", "\xE0\x80\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80",
        "\xF0\x8F\xBF\xBF", "\xF8\x88", "\xFF", "\x80", "\xBF", "\xE2\x82", "\xF0\x9F\x98", "\xF1", "\xC3",
    };
    std::string bytes;
    for (auto count = random() % 12; count > 0; count--) {
        bytes += random() % 4 == 0 ? std::string(1, static_cast<char>(random() % 256)) : parts[random() % parts.size()];
    }
    return bytes;
}

std::vector<std::string> random_split(const std::string& bytes, std::mt19937& random) {
    std::vector<std::string> pieces;
    for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t size = std::min<std::size_t>(random() % 4, bytes.size() - at);  // a piece may be empty
        pieces.push_back(bytes.substr(at, size));
        at += size;
    }
    return pieces;
}

}  // namespace

TEST_CASE("Utf8Assembler gives whole characters at once") {
    Utf8Assembler assembler;
    CHECK_EQ(assembler.push("h\xC3\xA9llo"), "h\xC3\xA9llo");
    CHECK(!assembler.holds_bytes());
    CHECK_EQ(assembler.push(""), "");
    CHECK_EQ(assembler.finish(), "");
}

TEST_CASE("Utf8Assembler holds an incomplete character back until its last byte") {
    Utf8Assembler assembler;
    CHECK_EQ(assembler.push("x\xF0"), "x");
    CHECK(assembler.holds_bytes());
    CHECK_EQ(assembler.push("\x9F"), "");
    CHECK_EQ(assembler.push("\x98"), "");
    CHECK_EQ(assembler.push("\x80y"), "\xF0\x9F\x98\x80y");
    CHECK(!assembler.holds_bytes());
}

TEST_CASE("Utf8Assembler replaces a character that never ends once, at the end") {
    Utf8Assembler assembler;
    CHECK_EQ(assembler.push("\xE2\x82"), "");
    CHECK_EQ(assembler.finish(), kReplacement);
    CHECK(!assembler.holds_bytes());
    CHECK_EQ(assembler.finish(), "");
}

TEST_CASE("Utf8Assembler replaces each maximal subpart of an ill-formed sequence by one U+FFFD") {
    // Unicode 15, section 3.9, tables 3-8 to 3-11.
    const std::vector<std::pair<std::string, int>> examples = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82", 8},  // non-shortest forms
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF", 8},  // surrogates
        {"\xF4\x91\x92\x93\xFF\x80\xBF", 7},      // past U+10FFFF and others
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF", 4},  // truncated
    };
    for (const auto& [bytes, count] : examples) {
        std::string expected;
        for (int i = 0; i < count; i++) {
            expected += kReplacement;
        }
        CHECK_EQ(assemble({bytes + "A"}), expected + "A");
        CHECK_EQ(test::decode_utf8(bytes + "A"), expected + "A");
    }
}

TEST_CASE("Utf8Assembler agrees with a one-shot decoder on every sequence of up to two bytes") {
    for (int first = 0; first < 256; first++) {
        const std::string one(1, static_cast<char>(first));
        CHECK_EQ(assemble({one}), test::decode_utf8(one));
        for (int second = 0; second < 256; second++) {
            const std::string two = one + static_cast<char>(second);
            CHECK_EQ(assemble({two}), test::decode_utf8(two));
            CHECK_EQ(assemble({one, two.substr(1)}), test::decode_utf8(two));
        }
    }
}

TEST_CASE("Utf8Assembler agrees with a one-shot decoder on every character") {
    for (std::uint32_t code = 0; code <= 0x10FFFF; code += code < 0x3000 || code > 0xD000 ? 1 : 97) {
        if (code >= 0xD800 && code <= 0xDFFF) {
            continue;
        }
        const auto byte = [](std::uint32_t value) { return static_cast<char>(value); };
        std::string bytes;
        if (code < 0x80) {
            bytes = {byte(code)};
        } else if (code < 0x800) {
            bytes = {byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F))};
        } else if (code < 0x10000) {
            bytes = {byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F))};
        } else {
            bytes = {byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F))};
            code += 30;  // a sample of the supplementary planes
        }
        Utf8Assembler assembler;
        const std::string held = assembler.push(std::string_view(bytes).substr(0, bytes.size() - 1));
        CHECK_EQ(held, "");
        CHECK_EQ(assembler.push(std::string_view(bytes).substr(bytes.size() - 1)), bytes);
    }
}

TEST_CASE("Utf8Assembler gives the same text however random bytes are split") {
    std::mt19937 random(1);
    for (int round = 0; round < 20'000; round++) {
        const std::string bytes = random_bytes(random);
        const std::string expected = test::decode_utf8(bytes);
        CHECK_EQ(assemble({bytes}), expected);
        CHECK_EQ(assemble(random_split(bytes, random)), expected);
    }
}

TEST_CASE("Utf8Assembler accepts what it would replace nothing of") {
    std::mt19937 random(2);
    for (int round = 0; round < 20'000; round++) {
        const std::string bytes = random_bytes(random);
        const std::size_t cut = bytes.empty() ? 0 : random() % bytes.size();
        Utf8Assembler assembler;
        const bool whole_so_far = Utf8Assembler().accepts(std::string_view(bytes).substr(0, cut));
        std::string text = assembler.push(std::string_view(bytes).substr(0, cut));
        const bool accepts = assembler.accepts(std::string_view(bytes).substr(cut));
        text += assembler.push(std::string_view(bytes).substr(cut));
        CHECK_EQ(whole_so_far && accepts, bytes.compare(0, text.size(), text) == 0);
    }
}
