#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "grammar.h"
#include "llama-cpp.h"
#include "llama_moe/sampling.h"
#include "token_trie.h"

namespace llama_moe {

// What sampling needs to know of a model, collected once.
struct SamplingVocabulary {
    explicit SamplingVocabulary(const llama_model* model);

    // The texts of its tokens; made when they are first asked for.
    std::shared_ptr<const TokenTrie> trie() const;

    const llama_vocab* vocab;
    int size;
    int trained_context;
    std::vector<std::int32_t> end_tokens;         // every end-of-generation token, the usual one first
    std::vector<std::int32_t> suppressed_tokens;  // the model's file says that they are never to be chosen

   private:
    mutable std::once_flag trie_once_;
    mutable std::shared_ptr<const TokenTrie> trie_;
};

struct SampledLogprobs {
    float logprob;
    std::vector<std::pair<std::int32_t, float>> top;  // most likely first
};

// Chooses one request's tokens.
class Sampler {
   public:
    // `context_size` bounds the windows given as "the whole context". Throws InvalidOptionError.
    Sampler(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size);

    // Takes prompt tokens into account for penalties.
    void accept_prompt(const std::vector<std::int32_t>& tokens);
    // Chooses from `logits` (one per vocabulary token) and remembers the choice.
    std::int32_t sample(const float* logits);

   private:
    void add_penalties(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size);
    void add_choice(const SamplingOptions& options, const SamplingVocabulary& vocabulary);
    void remember(std::int32_t token);
    const float* adjusted(const float* logits);
    std::int32_t choose(const float* values);
    std::int32_t choose_allowed(const float* values);
    std::int32_t apply_chain(bool sorted);
    std::int32_t ending_token();

    int vocab_size_;
    std::vector<std::int32_t> end_tokens_;
    std::vector<llama_logit_bias> biases_;
    llama_sampler_ptr penalties_;          // a chain; it changes only logits of tokens that occurred
    int window_ = 0;                       // tokens that it looks back
    std::vector<std::int32_t> occurred_;   // each once
    std::vector<bool> has_occurred_;
    std::optional<Grammar> grammar_;
    llama_sampler_ptr chain_;              // empty: the largest logit
    int top_k_ = 0;                        // what the chain begins with; 0: with something else
    std::vector<float> adjusted_logits_;
    std::vector<llama_token_data> candidates_;
};

// Index of the largest value; the first of equals.
std::int32_t argmax(const float* values, int count);

// Puts the `k` candidates with the largest of `values` into `candidates`, largest first: the same ones, in the same order, as
// std::partial_sort of all candidates by their logits does, equal ones included.
void top_candidates(const float* values, int count, int k, std::vector<llama_token_data>& candidates);

// Log-probability of `token` under softmax(logits), and the `top` most likely tokens.
SampledLogprobs log_probabilities(const float* logits, int count, std::int32_t token, int top);

}  // namespace llama_moe
