#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace llama_moe {

// A grammar that a chat template asks for. Lazy: it binds from where a trigger appears in the output.
struct ChatGrammar {
    std::string text;  // GBNF; empty: none
    bool lazy = false;
    std::vector<std::string> trigger_patterns;  // regular expressions; the grammar begins at the first group, or the match
    std::vector<std::int32_t> trigger_tokens;
    std::vector<std::int32_t> prefill;  // tokens at the end of the prompt that a grammar which is not lazy begins with
    // A lazy grammar ignores what is between these.
    std::vector<std::int32_t> thinking_start;
    std::vector<std::vector<std::int32_t>> thinking_end;
};

// How one request chooses its tokens. Mirrored by the Python dataclass SamplingParams, but for what chat adds.
struct SamplingOptions {
    std::optional<int> max_tokens;   // unset: until the model stops or the context is full
    float temperature = 0.8f;        // 0: always the most likely token
    float dynatemp_range = 0.0f;     // the temperature follows the entropy, this far up and down; 0: off
    float dynatemp_exponent = 1.0f;
    int top_k = 40;                  // candidates kept; 0: all
    float top_p = 0.95f;             // smallest set with this probability; 1: all
    float min_p = 0.05f;             // at least this share of the best candidate's probability; 0: all
    float typical_p = 1.0f;          // locally typical sampling; 1: off
    float top_n_sigma = -1.0f;       // standard deviations below the best logit; 0 or less: off
    int min_keep = 1;                // candidates that top_p, min_p, typical_p and xtc leave at least
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
    float adaptive_target = -1.0f;   // prefer tokens near this probability; negative: off
    float adaptive_decay = 0.9f;
    bool infill = false;             // merge candidates that begin alike, for text between a prefix and a suffix
    std::optional<std::uint32_t> seed;      // unset: a random one
    std::vector<std::string> stop;          // strings that end the text; not part of it
    std::optional<int> logprobs;            // n: each token's log-probability and those of the n most likely
    std::map<std::int32_t, float> logit_bias;  // added to a token's logit
    bool ignore_eos = false;                // never choose an end-of-generation token, unless a grammar allows nothing else
    std::optional<std::string> grammar;     // GBNF that the text must match
    std::optional<std::string> json_schema; // of the JSON that the text must be

    ChatGrammar chat_grammar;
    std::vector<std::int32_t> preserved_tokens;  // control tokens that are part of the text

    void validate() const;
};

}  // namespace llama_moe
