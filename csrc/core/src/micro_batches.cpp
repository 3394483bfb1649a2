#include "micro_batches.h"

#include <algorithm>

namespace llama_moe {

MicroBatches::MicroBatches(const std::vector<BatchRow>& batch, bool unified) : batch_(batch), unified_(unified), used_(batch.size()) {}

// The first ones of the batch that are left.
std::vector<int> MicroBatches::in_order(std::size_t count) const {
    std::vector<int> rows;
    for (std::size_t i = 0; i < batch_.size() && rows.size() < count; i++) {
        if (!used_[i]) {
            rows.push_back(static_cast<int>(i));
        }
    }
    return rows;
}

// What is left of each sequence, in the order in which the sequences come.
std::vector<MicroBatches::Sequence> MicroBatches::remaining() const {
    std::vector<Sequence> sequences;
    for (std::size_t i = 0; i < batch_.size(); i++) {
        if (used_[i]) {
            continue;
        }
        const int number = batch_[i].token.sequence;
        auto found = std::find_if(sequences.begin(), sequences.end(), [&](const auto& sequence) { return sequence.number == number; });
        if (found == sequences.end()) {
            found = sequences.insert(found, {number, {}});
        }
        found->rows.push_back(static_cast<int>(i));
    }
    return sequences;
}

// Those of them that llama.cpp puts together where each has a buffer of its own: it goes through the tokens, and takes the sequence of
// one if its number is that of the last one taken and one more.
std::vector<MicroBatches::Sequence> MicroBatches::consecutive(const std::vector<Sequence>& sequences) const {
    std::vector<Sequence> taken;
    for (std::size_t i = 0; i < batch_.size(); i++) {
        const int number = batch_[i].token.sequence;
        if (!used_[i] && (taken.empty() || number == taken.back().number + 1)) {
            taken.push_back(*std::find_if(sequences.begin(), sequences.end(), [&](const auto& sequence) { return sequence.number == number; }));
        }
    }
    return taken;
}

// As many tokens of each of the first few sequences; none when some sequence has not so many.
std::vector<int> MicroBatches::equally(const std::vector<Sequence>& sequences, std::size_t of, std::size_t count) {
    std::vector<int> rows;
    if (of == 0 || count % of != 0) {
        return rows;
    }
    const auto each = static_cast<std::ptrdiff_t>(count / of);
    for (std::size_t s = 0; s < of; s++) {
        const auto& left = sequences[s].rows;
        if (static_cast<std::ptrdiff_t>(left.size()) < each) {
            return {};
        }
        rows.insert(rows.end(), left.begin(), left.begin() + each);
    }
    return rows;
}

std::vector<int> MicroBatches::take(const std::vector<std::int32_t>& tokens) {
    const std::size_t count = tokens.size();
    const auto sequences = remaining();
    std::vector<std::vector<int>> ways;
    if (unified_) {
        ways.push_back(in_order(count));
    }
    for (const auto& together : {consecutive(sequences), sequences}) {
        for (std::size_t of = together.size(); of > 0; of--) {
            ways.push_back(equally(together, of, count));
        }
    }
    ways.push_back(in_order(count));
    for (const auto& rows : ways) {
        const auto agrees = [&](int row, std::int32_t token) { return batch_[static_cast<std::size_t>(row)].token.token == token; };
        if (rows.size() == count && std::equal(rows.begin(), rows.end(), tokens.begin(), agrees)) {
            for (const int row : rows) {
                used_[static_cast<std::size_t>(row)] = true;
            }
            return rows;
        }
    }
    return std::vector<int>(count, -1);
}

}  // namespace llama_moe
