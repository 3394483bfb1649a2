#include "token_trie.h"

#include <algorithm>

namespace llama_moe {
namespace {

constexpr std::uint32_t kMaxDepth = (1u << 24) - 1;

}  // namespace

TokenTrie::TokenTrie(const llama_vocab* vocab) {
    read_texts(vocab);
    add_nodes();
}

void TokenTrie::read_texts(const llama_vocab* vocab) {
    const std::int32_t count = llama_vocab_n_tokens(vocab);
    std::vector<char> text(64);
    offsets_.push_back(0);
    for (std::int32_t token = 0; token < count; token++) {
        const auto read = [&] { return llama_token_to_piece(vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, /*special=*/true); };
        std::int32_t size = read();
        if (size < 0) {
            text.resize(static_cast<std::size_t>(-size));
            size = read();
        }
        texts_.insert(texts_.end(), text.begin(), text.begin() + size);
        offsets_.push_back(static_cast<std::uint32_t>(texts_.size()));
        char none;
        if (llama_vocab_is_eog(vocab, token)) {
            kinds_.push_back(Kind::end);
            end_tokens_.push_back(token);
        } else if (size > 0 && llama_token_to_piece(vocab, token, &none, 0, 0, /*special=*/false) == 0) {
            kinds_.push_back(Kind::control);
            control_tokens_.push_back(token);
        } else {
            kinds_.push_back(Kind::text);
        }
    }
}

std::string_view TokenTrie::text(std::int32_t token) const {
    const auto at = static_cast<std::size_t>(token);
    return {texts_.data() + offsets_[at], offsets_[at + 1] - offsets_[at]};
}

void TokenTrie::add_nodes() {
    for (std::size_t i = 0; i < size(); i++) {
        const auto token = static_cast<std::int32_t>(i);
        const auto bytes = text(token);
        if (!bytes.empty() && bytes.size() <= kMaxDepth && bytes.find('\0') == std::string_view::npos && !is_end(token)) {
            tokens_.push_back(token);
            depth_ = std::max(depth_, bytes.size());
        }
    }
    std::stable_sort(tokens_.begin(), tokens_.end(), [this](auto a, auto b) { return text(a) < text(b); });

    std::vector<std::size_t> path;  // nodes from the root to the last one
    const auto end_nodes = [&](std::size_t kept) {
        for (; path.size() > kept; path.pop_back()) {
            nodes_[path.back()].end = static_cast<std::uint32_t>(nodes_.size());
        }
    };
    std::string_view last;
    for (std::size_t i = 0; i < tokens_.size(); i++) {
        const auto bytes = text(tokens_[i]);
        const auto differs = std::mismatch(last.begin(), last.end(), bytes.begin(), bytes.end()).first;
        end_nodes(static_cast<std::size_t>(differs - last.begin()));
        while (path.size() < bytes.size()) {
            const auto byte = static_cast<unsigned char>(bytes[path.size()]);
            // Nodes on the way to the token's own have none: the next node's begin there too.
            path.push_back(nodes_.size());
            nodes_.push_back({0, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(path.size()) & kMaxDepth, byte});
        }
        last = bytes;
    }
    end_nodes(0);
    nodes_.push_back({static_cast<std::uint32_t>(nodes_.size() + 1), static_cast<std::uint32_t>(tokens_.size()), 0, 0});
}

}  // namespace llama_moe
