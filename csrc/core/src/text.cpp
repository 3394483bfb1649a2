#include "llama_moe/text.h"

#include <algorithm>
#include <utility>

namespace llama_moe {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Sequence {
    std::size_t size;  // bytes looked at; 0: incomplete, more bytes are needed
    bool valid;
};

// Reads one character from the front of non-empty `bytes`. For an ill-formed one, `size` is its maximal subpart.
Sequence read_character(std::string_view bytes) {
    const auto at = [bytes](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
    const unsigned lead = at(0);
    if (lead < 0x80) {
        return {1, true};
    }
    const std::size_t size = lead >= 0xC2 && lead <= 0xDF ? 2 : lead >= 0xE0 && lead <= 0xEF ? 3 : lead >= 0xF0 && lead <= 0xF4 ? 4 : 0;
    if (size == 0) {
        return {1, false};
    }
    // The second byte's range excludes overlong forms, surrogates and what is past U+10FFFF.
    const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (std::size_t i = 1; i < size; i++) {
        if (i == bytes.size()) {
            return {0, false};
        }
        if (at(i) < (i == 1 ? low : 0x80) || at(i) > (i == 1 ? high : 0xBF)) {
            return {i, false};
        }
    }
    return {size, true};
}

}  // namespace

std::string Utf8Assembler::push(std::string_view bytes) {
    held_ += bytes;
    std::string text;
    std::string_view rest = held_;
    while (!rest.empty()) {
        const auto [size, valid] = read_character(rest);
        if (size == 0) {
            break;
        }
        text += valid ? rest.substr(0, size) : kReplacement;
        rest.remove_prefix(size);
    }
    held_ = std::string(rest);
    return text;
}

bool Utf8Assembler::accepts(std::string_view bytes) const {
    const std::string all = held_ + std::string(bytes);
    std::string_view rest = all;
    while (!rest.empty()) {
        const auto [size, valid] = read_character(rest);
        if (!valid) {
            return size == 0;
        }
        rest.remove_prefix(size);
    }
    return true;
}

std::string Utf8Assembler::finish() {
    // What is held is one maximal subpart: a truncated, so far well-formed character.
    const bool incomplete = !held_.empty();
    held_.clear();
    return incomplete ? std::string(kReplacement) : "";
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

StopMatcher::Result StopMatcher::match(std::string_view held) const {
    // The stop string that is complete first, not the one that begins first: so the text does not depend on how it was
    // cut into tokens. Of those that are complete at once it is the longest.
    std::size_t begin = std::string_view::npos;
    std::size_t end = std::string_view::npos;
    for (const auto& stop : stops_) {
        const std::size_t found = held.find(stop);
        if (found != std::string_view::npos && std::make_pair(found + stop.size(), found) < std::make_pair(end, begin)) {
            begin = found;
            end = found + stop.size();
        }
    }
    if (begin != std::string_view::npos) {
        return {begin, true};
    }
    // The longest end of the text that some stop string begins with.
    std::size_t open = 0;
    for (const auto& stop : stops_) {
        for (std::size_t size = std::min(stop.size() - 1, held.size()); size > open; size--) {
            if (held.substr(held.size() - size) == std::string_view(stop).substr(0, size)) {
                open = size;
                break;
            }
        }
    }
    return {held.size() - open, false};
}

std::vector<TextPiece> TextAssembler::push(std::int32_t token, std::string_view bytes) {
    std::string text = utf8_.push(bytes);
    held_text_ += text;
    held_.push_back({token, std::move(text), next_index_++});
    if (matcher_.empty()) {
        return release(held_text_.size(), false);
    }
    const auto [safe, stopped] = matcher_.match(held_text_);
    if (!stopped) {
        return release(safe, false);
    }
    stopped_ = true;
    held_text_.resize(safe);
    return release(safe, true);
}

std::vector<TextPiece> TextAssembler::finish() {
    if (stopped_ || held_.empty()) {
        return {};
    }
    const std::string rest = utf8_.finish();
    held_.back().text += rest;
    held_text_ += rest;
    const auto [safe, stopped] = matcher_.match(held_text_);
    stopped_ = stopped;
    if (stopped_) {
        held_text_.resize(safe);
    }
    return release(held_text_.size(), true);
}

// Gives out the tokens whose text ends within the first `safe_bytes` of the held text. With `all`, the generation is
// over: a token that reaches past them is cut there, and those that would have no text left after a cut are dropped.
std::vector<TextPiece> TextAssembler::release(std::size_t safe_bytes, bool all) {
    std::vector<TextPiece> pieces;
    std::size_t used = 0;
    while (!held_.empty()) {
        TextPiece& front = held_.front();
        const std::size_t end = used + front.text.size();
        // The newest token may own the first bytes of an unfinished character: its text is not certain before that is.
        const bool unfinished = utf8_.holds_bytes() && held_.size() == 1;
        if (!all && (end > safe_bytes || unfinished)) {
            break;
        }
        if (end > safe_bytes) {
            front.text.resize(safe_bytes - used);
        }
        if (!(stopped_ && front.text.empty() && used == safe_bytes)) {
            pieces.push_back(std::move(front));
        }
        used = std::min(end, safe_bytes);
        held_.pop_front();
    }
    held_text_.erase(0, used);
    return pieces;
}

}  // namespace llama_moe
