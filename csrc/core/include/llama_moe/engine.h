#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llama_moe/context.h"
#include "llama_moe/model.h"
#include "llama_moe/notifier.h"
#include "llama_moe/sampling.h"
#include "llama_moe/wait.h"

namespace llama_moe {

struct TokenLogprob {
    std::int32_t token;
    std::string text;
    float logprob;
};

struct GeneratedToken {
    std::int32_t id;
    std::string text;
    std::optional<float> logprob;
    std::vector<TokenLogprob> top;
};

struct GenerationResult {
    std::string finish_reason;  // "stop", "length" or "cancelled"
    int prompt_tokens = 0;
    int cached_tokens = 0;  // prompt tokens that were not computed again
    int completion_tokens = 0;
    double queue_seconds = 0;
    double prompt_seconds = 0;
    double decode_seconds = 0;
    double time_to_first_token = 0;  // from submission
};

// How a request's output is waited for.
struct DeliveryOptions {
    std::optional<double> timeout;       // seconds from submission to the end; unset: no limit
    std::shared_ptr<Notifier> notifier;  // told when there is news for who found none
    std::uint64_t tag = 0;               // what it is told

    void validate() const;
};

// What take() found.
struct Delivered {
    std::vector<GeneratedToken> tokens;
    bool ended = false;  // there will be no more
};

class EngineCore;
struct Request;

// One request's output. Any thread may read it, one at a time.
class Generation {
   public:
    Generation(std::shared_ptr<EngineCore> engine, std::shared_ptr<Request> request);
    ~Generation();  // cancels
    Generation(const Generation&) = delete;
    Generation& operator=(const Generation&) = delete;

    // All tokens that nobody took yet. When there are none: waits for some or the end; without `wait`, returns without any, and
    // the request's notifier is told of the next ones. Throws what ended the generation early.
    Delivered take(bool wait, const Poll& poll = {});
    void cancel();
    // For who waits for the notifier, now and then: a generation that a device failure has ended then says so.
    void check_lost();
    // Throws std::logic_error-like Error while the generation still runs.
    GenerationResult result() const;

   private:
    std::shared_ptr<EngineCore> engine_;
    std::shared_ptr<Request> request_;
};

struct EngineStats {
    std::uint64_t requests_submitted = 0;
    std::uint64_t requests_finished = 0;
    std::uint64_t requests_running = 0;
    std::uint64_t requests_waiting = 0;
    std::uint64_t prompt_tokens = 0;     // computed
    std::uint64_t generated_tokens = 0;
    std::uint64_t decode_calls = 0;
    double decode_seconds = 0;           // in llama_decode
    double sample_seconds = 0;
};

// Generates for many requests in one batch, on one thread of its own.
class Engine : public ModelUser {
   public:
    static std::shared_ptr<Engine> create(const std::shared_ptr<Model>& model, const ContextOptions& options, const Poll& poll = {});
    ~Engine() override;

    std::unique_ptr<Generation> submit(std::vector<std::int32_t> prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery = {});
    std::unique_ptr<Generation> submit(const std::string& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery = {});

    std::vector<MemoryRow> memory(const Poll& poll = {});
    std::vector<BreakdownRow> breakdown(const Poll& poll = {});
    EngineStats stats() const;
    const ContextLimits& limits() const { return limits_; }

    // Cancels what runs and waits for the engine's thread. Idempotent.
    void close() override;
    bool closed() const;

   private:
    Engine() = default;

    std::shared_ptr<Model> model_;
    std::shared_ptr<EngineCore> core_;
    ContextLimits limits_{};
};

}  // namespace llama_moe
