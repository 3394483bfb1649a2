// A decoder that remembers tokens instead of computing with them: the logits after a token are a hash of all tokens before it, so
// any mistake about what a sequence holds shows in what is generated. It checks what it is asked to do.
#pragma once

#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"

namespace test {

class SimulatedDecoder : public llama_moe::Decoder {
   public:
    struct Options {
        int context_size = 64;
        int sequences = 4;
        int batch_size = 32;
        int micro_batch_size = 8;
        int pool = 0;  // cells of a shared pool
        int draft = 0;
        int score_rows = 4;
        bool can_truncate = true;
        double failures = 0;  // share of calls that fail, and as many that are aborted
        unsigned seed = 1;
    };

    SimulatedDecoder(const Options& options, int vocab_size, int first_token, int last_token)
        : options_(options),
          limits_{options.context_size, options.sequences, options.batch_size, options.micro_batch_size, 1, 1},
          first_(first_token),
          last_(last_token),
          vocab_size_(vocab_size),
          cells_(static_cast<std::size_t>(options.sequences)),
          data_(static_cast<std::size_t>(options.sequences)),
          random_(options.seed) {}

    // The token that follows these.
    std::int32_t next(const std::vector<std::int32_t>& tokens) const {
        std::uint64_t hash = 1469598103934665603ull;
        for (const auto token : tokens) {
            hash = (hash ^ static_cast<std::uint64_t>(token)) * 1099511628211ull;
            hash ^= hash >> 29;
        }
        return first_ + static_cast<std::int32_t>(hash % static_cast<std::uint64_t>(last_ - first_ + 1));
    }

    std::vector<std::int32_t> continuation(std::vector<std::int32_t> tokens, int count) const {
        const std::size_t begin = tokens.size();
        for (int i = 0; i < count; i++) {
            tokens.push_back(next(tokens));
        }
        return {tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.end()};
    }

    int decoded_tokens = 0;
    int calls = 0;
    int failed = 0;
    int drafted = 0;
    std::vector<llama_moe::BatchToken> last_batch;

    const llama_moe::ContextLimits& limits() const override { return limits_; }
    int max_outputs() const override { return options_.sequences * (1 + options_.draft) + options_.score_rows; }
    int max_draft() const override { return options_.draft; }
    bool can_truncate() const override { return options_.can_truncate; }
    bool shares_cells() const override { return options_.pool > 0; }
    int embedding_size() const override { return 2; }

    llama_moe::DecodeStatus decode(const std::vector<llama_moe::BatchToken>& batch, bool embeddings) override {
        require(!batch.empty() && static_cast<int>(batch.size()) <= options_.batch_size, "the batch's size");
        last_batch = batch;
        calls++;
        if (options_.pool > 0 && used() + static_cast<int>(batch.size()) > options_.pool) {
            return llama_moe::DecodeStatus::full;
        }
        for (const auto& [source, destination] : copies_) {  // as llama.cpp does, not before
            data_[destination] = data_[source];
        }
        copies_.clear();
        const double luck = std::uniform_real_distribution<>(0, 1)(random_);
        // A call that fails or is aborted leaves some of its tokens behind.
        const std::size_t applied = luck < 2 * options_.failures ? random_() % (batch.size() + 1) : batch.size();
        rows_.assign(batch.size(), {});
        states_.assign(batch.size(), {});
        int outputs = 0;
        int last_sequence = -1;
        for (std::size_t i = 0; i < applied; i++) {
            const auto& token = batch[i];
            require(token.sequence >= last_sequence && token.sequence < options_.sequences, "the order of sequences");
            last_sequence = token.sequence;
            auto& cells = cells_[static_cast<std::size_t>(token.sequence)];
            require(token.position == static_cast<int>(cells.size()), "the position of a token");
            require(token.position < options_.context_size, "the length of a sequence");
            cells.push_back(token.token);
            auto& data = data_[static_cast<std::size_t>(token.sequence)];
            data.resize(cells.size());
            data.back() = token.token;
            if (token.output || embeddings) {
                outputs++;
                rows_[i].assign(static_cast<std::size_t>(vocab_size_), 0.0f);
                rows_[i][static_cast<std::size_t>(next(data))] = 5.0f;
                states_[i] = {static_cast<float>(token.token), static_cast<float>(cells.size())};
            }
        }
        require(outputs <= max_outputs(), "the number of outputs");
        if (luck < 2 * options_.failures) {
            failed += luck < options_.failures ? 1 : 0;
            return luck < options_.failures ? llama_moe::DecodeStatus::failed : llama_moe::DecodeStatus::aborted;
        }
        decoded_tokens += static_cast<int>(batch.size());
        return llama_moe::DecodeStatus::done;
    }

    const float* logits(int index) override {
        const auto& row = rows_.at(static_cast<std::size_t>(index));
        require(!row.empty(), "logits that were not asked for");
        return row.data();
    }

    const float* embedding(int index) override { return states_.at(static_cast<std::size_t>(index)).data(); }

    bool truncate(int sequence, int length) override {
        auto& cells = cells_.at(static_cast<std::size_t>(sequence));
        if (length >= static_cast<int>(cells.size())) {
            return true;
        }
        const bool partly = length > 0 && options_.can_truncate;
        cells.resize(partly ? static_cast<std::size_t>(length) : 0);
        return partly || length == 0;
    }

    void copy(int source, int destination) override {
        require(source != destination, "a copy to itself");
        cells_.at(static_cast<std::size_t>(destination)) = cells_.at(static_cast<std::size_t>(source));
        if (options_.pool > 0) {
            data_[static_cast<std::size_t>(destination)] = data_[static_cast<std::size_t>(source)];
        } else {
            copies_.emplace_back(source, destination);
        }
        copies++;
    }
    int copies = 0;

    // Guesses that are right three times of four.
    void draft(std::vector<llama_moe::Draft>& drafts) override {
        for (auto& draft : drafts) {
            require(*draft.cached == cells_.at(static_cast<std::size_t>(draft.sequence)), "what a draft continues");
            auto tokens = *draft.cached;
            tokens.push_back(draft.last);
            const int count = 1 + static_cast<int>(random_() % static_cast<unsigned>(draft.most));
            *draft.tokens = continuation(tokens, count);
            for (auto& token : *draft.tokens) {
                token = random_() % 4 == 0 ? first_ : token;
            }
            drafted += count;
        }
    }

    std::string save(int sequence) override {
        const auto& cells = cells_.at(static_cast<std::size_t>(sequence));
        return {reinterpret_cast<const char*>(cells.data()), cells.size() * sizeof(std::int32_t)};
    }

    bool restore(int sequence, const std::vector<std::int32_t>& tokens, const std::string& state) override {
        auto& cells = cells_.at(static_cast<std::size_t>(sequence));
        cells.clear();
        if (state.size() != tokens.size() * sizeof(std::int32_t)) {
            return false;
        }
        cells = tokens;
        data_[static_cast<std::size_t>(sequence)] = tokens;
        return true;
    }

    // Cells in use: a beginning that sequences share counts once.
    int used() const {
        std::set<std::vector<std::int32_t>> distinct;
        for (const auto& cells : cells_) {
            for (std::size_t size = 1; size <= cells.size(); size++) {
                distinct.emplace(cells.begin(), cells.begin() + static_cast<std::ptrdiff_t>(size));
            }
        }
        return static_cast<int>(distinct.size());
    }

   private:
    static void require(bool condition, const char* what) {
        if (!condition) {
            throw std::logic_error(std::string("the scheduler got wrong: ") + what);
        }
    }

    const Options options_;
    const llama_moe::ContextLimits limits_;
    const int first_;
    const int last_;
    const int vocab_size_;
    std::vector<std::vector<std::int32_t>> cells_;  // what each sequence is said to hold,
    std::vector<std::vector<std::int32_t>> data_;   // and what its buffer does
    std::vector<std::pair<std::size_t, std::size_t>> copies_;
    std::vector<std::vector<float>> rows_;
    std::vector<std::vector<float>> states_;
    std::mt19937 random_;
};

}  // namespace test
