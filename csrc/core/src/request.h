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
    Request(RequestKind request_kind, std::vector<std::int32_t> prompt, const SamplingOptions& options, const SamplingVocabulary& vocabulary,
            int context_size);

    const RequestKind kind;
    const std::size_t prompt_size;
    const std::optional<int> max_tokens;
    const std::optional<int> logprobs;
    EmbeddingOptions embedding;
    const Clock::time_point submitted = Clock::now();
    std::atomic<bool> cancelled{false};

    Sampler sampler;
    TextAssembler assembler;
    std::vector<std::int32_t> tokens;  // the prompt and what was generated
    std::atomic<int> generated{0};
    std::atomic<int> cached_tokens{0};  // of the prompt: not computed again
    std::uint64_t order = 0;            // of admission
    std::atomic<Clock::time_point> started{};
    std::atomic<Clock::time_point> first_token{};
    std::deque<std::pair<std::size_t, SampledLogprobs>> sampled_logprobs;  // of tokens whose text is still held back

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<GeneratedToken> ready;
    std::vector<float> values;  // score: a log-probability for each token but the first; embed: rows of embeddings
    std::string state;          // save: the sequence's saved state
    bool finished = false;
    std::exception_ptr error;
    GenerationResult result;

    void deliver(std::vector<GeneratedToken> pieces);
    // The first call decides; later ones change nothing. Returns whether this was the first.
    bool finish(const std::string& reason);
    bool fail(std::exception_ptr why);

   private:
    void record_timings();
};

}  // namespace llama_moe
