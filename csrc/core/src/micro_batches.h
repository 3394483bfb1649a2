#pragma once

#include <cstdint>
#include <vector>

#include "llama_moe/routing.h"

namespace llama_moe {

struct BatchRow {
    RoutedToken token;
    bool output;  // its logits are wanted
};

// Which tokens of a batch llama.cpp computed together, and in what order. It cuts a batch into micro-batches: in the batch's order where
// all sequences share a buffer, else equally many tokens of sequences that follow each other (llama-batch.cpp: split_simple,
// split_equal, split_seq). It does not say what came of it; but the tokens of a micro-batch are known, and those must agree.
class MicroBatches {
   public:
    MicroBatches(const std::vector<BatchRow>& batch, bool unified);

    // The rows of the batch that the next micro-batch has, in its order; all -1 when no way to cut the batch gives these tokens.
    std::vector<int> take(const std::vector<std::int32_t>& tokens);

   private:
    struct Sequence {
        int number;
        std::vector<int> rows;  // not taken yet
    };
    std::vector<Sequence> remaining() const;
    std::vector<Sequence> consecutive(const std::vector<Sequence>& sequences) const;
    std::vector<int> in_order(std::size_t count) const;
    static std::vector<int> equally(const std::vector<Sequence>& sequences, std::size_t of, std::size_t count);

    const std::vector<BatchRow>& batch_;
    const bool unified_;
    std::vector<bool> used_;
};

}  // namespace llama_moe
