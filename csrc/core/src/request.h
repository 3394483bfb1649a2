#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llama_moe/engine.h"
#include "llama_moe/text.h"
#include "sampler.h"

namespace llama_moe {

using Clock = std::chrono::steady_clock;

// One request on its way from submit() to its last token. The first part belongs to the engine's thread, but for what is
// atomic: a consumer that cancels takes the timings. `mutex` guards the second part, which the consumer reads.
struct Request {
    Request(std::vector<std::int32_t> prompt_tokens, const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size);

    const std::vector<std::int32_t> prompt;
    const std::optional<int> max_tokens;
    const std::optional<int> logprobs;
    const std::vector<std::int32_t> preserved_tokens;  // control tokens whose text is part of the output
    const Clock::time_point submitted = Clock::now();
    std::atomic<bool> cancelled{false};

    Sampler sampler;
    TextAssembler assembler;
    std::size_t prompt_done = 0;  // prompt tokens in the KV cache
    std::int32_t last_token = -1;
    std::atomic<int> generated{0};
    int position = 0;  // tokens in the KV cache
    std::atomic<Clock::time_point> started{};
    std::atomic<Clock::time_point> first_token{};
    std::deque<std::pair<std::size_t, SampledLogprobs>> sampled_logprobs;  // of tokens whose text is still held back

    bool in_prompt() const { return prompt_done < prompt.size(); }

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<GeneratedToken> ready;
    bool finished = false;
    std::exception_ptr error;
    GenerationResult result;

    void deliver(std::vector<GeneratedToken> tokens);
    // The first call decides; later ones change nothing. Returns whether this was the first.
    bool finish(const std::string& reason);
    bool fail(std::exception_ptr why);

   private:
    void record_timings();
};

}  // namespace llama_moe
