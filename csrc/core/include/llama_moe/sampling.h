#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace llama_moe {

// How one request chooses its tokens. Mirrored by the Python dataclass SamplingParams.
struct SamplingOptions {
    std::optional<int> max_tokens;   // unset: until the model stops or the context is full
    float temperature = 0.8f;        // 0: always the most likely token
    int top_k = 40;                  // candidates kept; 0: all
    float top_p = 0.95f;             // smallest set with this probability; 1: all
    float min_p = 0.05f;             // at least this share of the best candidate's probability; 0: all
    float typical_p = 1.0f;          // locally typical sampling; 1: off
    float top_n_sigma = -1.0f;       // standard deviations below the best logit; 0 or less: off
    float repeat_penalty = 1.0f;     // 1: off
    float presence_penalty = 0.0f;   // 0: off
    float frequency_penalty = 0.0f;  // 0: off
    int penalty_window = 64;         // last tokens penalised; 0: none; -1: the whole context
    float xtc_probability = 0.0f;    // exclude top choices; 0: off
    float xtc_threshold = 0.1f;
    float dry_multiplier = 0.0f;     // "don't repeat yourself"; 0: off
    float dry_base = 1.75f;
    int dry_allowed_length = 2;
    int dry_penalty_window = -1;     // tokens; 0: off; -1: the whole context
    std::vector<std::string> dry_sequence_breakers = {"\n", ":", "\"", "*"};
    int mirostat = 0;                // 0: off; 1 or 2: the version
    float mirostat_tau = 5.0f;
    float mirostat_eta = 0.1f;
    std::optional<std::uint32_t> seed;      // unset: a random one
    std::vector<std::string> stop;          // strings that end the text; not part of it
    std::optional<int> logprobs;            // n: each token's log-probability and those of the n most likely
    std::map<std::int32_t, float> logit_bias;  // added to a token's logit
    bool ignore_eos = false;                // never choose an end-of-generation token

    void validate() const;
};

}  // namespace llama_moe
