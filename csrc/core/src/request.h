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
    Request(std::vector<std::int32_t> prompt_tokens, const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size,
            const DeliveryOptions& delivery);

    const std::vector<std::int32_t> prompt;
    const std::optional<int> max_tokens;
    const std::optional<int> logprobs;
    const Clock::time_point submitted = Clock::now();
    const std::optional<double> timeout;
    const Clock::time_point deadline;
    const std::uint64_t tag;
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
    bool past_deadline() const { return deadline != Clock::time_point::max() && Clock::now() >= deadline; }
    // Whether to stop working on it: it was cancelled, or it is past its deadline, which fails it.
    bool given_up();

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<GeneratedToken> ready;
    std::shared_ptr<Notifier> notifier;  // until the end
    bool notify = false;                 // who reads found nothing, and waits for the notifier
    std::atomic<int> waiting_threads{0};  // on `changed`; raised with the lock held, lowered with or without
    bool finished = false;
    std::exception_ptr error;
    GenerationResult result;

    void deliver(std::vector<GeneratedToken> tokens);
    // The first call decides; later ones change nothing. Returns whether this was the first.
    bool finish(const std::string& reason);
    bool fail(std::exception_ptr why);
    bool fail_by_timeout();

   private:
    // Wakes who waits, if anybody does, after giving back the lock that they would wait for.
    void announce(std::unique_lock<std::mutex> lock);
    void record_timings();
};

}  // namespace llama_moe
