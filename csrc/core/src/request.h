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
            int context_size, const DeliveryOptions& delivery = {});

    const RequestKind kind;
    const std::size_t prompt_size;
    const std::optional<int> max_tokens;
    const std::optional<int> logprobs;
    const std::vector<std::int32_t> preserved_tokens;  // control tokens whose text is part of the output
    EmbeddingOptions embedding;
    const Clock::time_point submitted = Clock::now();
    const std::optional<double> timeout;
    const Clock::time_point deadline;
    const std::uint64_t tag;
    std::atomic<bool> cancelled{false};

    Sampler sampler;
    TextAssembler assembler;
    std::vector<std::int32_t> tokens;  // the prompt and what was generated
    std::atomic<int> generated{0};
    std::atomic<int> cached_tokens{0};  // of the prompt: not computed again
    std::uint64_t order = 0;            // of admission
    std::int64_t number = -1;           // how many were submitted before
    std::atomic<Clock::time_point> started{};
    std::atomic<Clock::time_point> first_token{};
    std::deque<std::pair<std::size_t, SampledLogprobs>> sampled_logprobs;  // of tokens whose text is still held back

    bool past_deadline() const { return deadline != Clock::time_point::max() && Clock::now() >= deadline; }
    // Whether to stop working on it: it was cancelled, or it is past its deadline, which fails it.
    bool given_up();

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<GeneratedToken> ready;
    std::shared_ptr<Notifier> notifier;   // until the end
    bool notify = false;                  // who reads found nothing, and waits for the notifier
    std::atomic<int> waiting_threads{0};  // on `changed`; raised with the lock held, lowered with or without
    std::vector<float> values;  // score: a log-probability for each token but the first; embed: rows of embeddings
    std::string state;          // save: the sequence's saved state
    bool finished = false;
    std::exception_ptr error;
    GenerationResult result;

    void deliver(std::vector<GeneratedToken> pieces);
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
