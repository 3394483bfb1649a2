#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "llama-cpp.h"
#include "llama_moe/sampling.h"

namespace llama_moe {

// What sampling needs to know of a model, collected once.
struct SamplingVocabulary {
    explicit SamplingVocabulary(const llama_model* model);

    const llama_vocab* vocab;
    int size;
    int trained_context;
    std::vector<std::int32_t> end_tokens;  // every end-of-generation token
};

struct SampledLogprobs {
    float logprob;
    std::vector<std::pair<std::int32_t, float>> top;  // most likely first
};

// Chooses one request's tokens.
class Sampler {
   public:
    // `context_size` bounds the windows given as "the whole context".
    Sampler(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size);

    // Takes prompt tokens into account for penalties.
    void accept_prompt(const std::vector<std::int32_t>& tokens);
    // Chooses from `logits` (one per vocabulary token) and remembers the choice.
    std::int32_t sample(const float* logits);

   private:
    llama_sampler_ptr chain_;               // empty: greedy by biased logits alone, without a list of candidates
    std::vector<llama_logit_bias> biases_;  // only without a chain
    std::vector<float> biased_logits_;
    std::vector<llama_token_data> candidates_;
    int vocab_size_;
    bool remembers_ = false;  // some sampler of the chain looks at earlier tokens
};

// Index of the largest value; the first of equals.
std::int32_t argmax(const float* values, int count);

// Log-probability of `token` under softmax(logits), and the `top` most likely tokens.
SampledLogprobs log_probabilities(const float* logits, int count, std::int32_t token, int top);

}  // namespace llama_moe
