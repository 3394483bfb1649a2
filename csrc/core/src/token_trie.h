#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "llama-cpp.h"

namespace llama_moe {

// The texts of a vocabulary's tokens, also as a tree by their bytes: what tokens begin with alike is looked at once.
class TokenTrie {
   public:
    explicit TokenTrie(const llama_vocab* vocab);

    std::size_t size() const { return offsets_.size() - 1; }
    // A control token's text is its name.
    std::string_view text(std::int32_t token) const;
    bool is_control(std::int32_t token) const { return kinds_[static_cast<std::size_t>(token)] == Kind::control; }
    bool is_end(std::int32_t token) const { return kinds_[static_cast<std::size_t>(token)] == Kind::end; }

    const std::vector<std::int32_t>& control_tokens() const { return control_tokens_; }
    const std::vector<std::int32_t>& end_tokens() const { return end_tokens_; }

    // One byte behind those of the nodes above it. Nodes are in the order of a walk that goes down first.
    struct Node {
        std::uint32_t end;           // index of the first node that is not below this one
        std::uint32_t first_token;   // in tokens(); its tokens end where the next node's begin
        std::uint32_t depth : 24;    // bytes, this one included
        std::uint32_t byte : 8;
    };
    // A last one, of depth 0, follows the others. Tokens without text, with a NUL and those that end a text are in no node.
    const std::vector<Node>& nodes() const { return nodes_; }
    const std::vector<std::int32_t>& tokens() const { return tokens_; }
    std::size_t depth() const { return depth_; }

   private:
    enum class Kind : std::uint8_t { text, control, end };

    void read_texts(const llama_vocab* vocab);
    void add_nodes();

    std::vector<char> texts_;
    std::vector<std::uint32_t> offsets_;
    std::vector<Kind> kinds_;
    std::vector<std::int32_t> control_tokens_;
    std::vector<std::int32_t> end_tokens_;
    std::vector<Node> nodes_;
    std::vector<std::int32_t> tokens_;
    std::size_t depth_ = 0;
};

}  // namespace llama_moe
