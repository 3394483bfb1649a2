#pragma once

#include <string>

namespace llama_moe {

struct ContextOptions {
    int context_size = 4096;       // tokens of each sequence; 0: what the model was trained for
    int max_sequences = 1;         // sequences that can be held at once
    int batch_size = 2048;         // most tokens in one call of llama_decode
    int micro_batch_size = 512;    // most tokens computed at once
    int threads = 0;               // for single tokens; 0: one per usable physical core
    int threads_batch = 0;         // for prompts; 0: as `threads`
    std::string kv_type = "f16";   // ggml type of the KV cache
    std::string flash_attention = "auto";  // "auto", "on" or "off"
    bool offload_kv = true;        // KV cache on the accelerator of its layer

    void validate() const;
};

// What an engine has besides a context.
struct EngineOptions : ContextOptions {
    int context_pool = 0;            // tokens that all sequences share; 0: context_size for each
    int max_queue = 1024;            // requests that may wait for a sequence
    int draft_tokens = 0;            // speculative decoding: most tokens drafted at once; 0: off
    int draft_ngram = 0;             // look the last so many tokens up in the text so far; 0: use the draft model
    float draft_min_probability = 0; // a draft model's draft ends before a token it finds less likely

    void validate() const;
};

}  // namespace llama_moe
