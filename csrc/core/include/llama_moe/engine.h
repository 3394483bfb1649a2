#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "llama_moe/context.h"
#include "llama_moe/model.h"
#include "llama_moe/notifier.h"
#include "llama_moe/routing.h"
#include "llama_moe/sampling.h"
#include "llama_moe/wait.h"

namespace llama_moe {

enum class RequestKind { generate, score, embed, save };
enum class Pooling { none, mean, cls, last };

struct EmbeddingOptions {
    Pooling pooling = Pooling::mean;
    bool normalise = true;
};

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

// How a request gets into the queue, and how its output is waited for.
struct DeliveryOptions {
    std::optional<double> timeout;       // seconds from submission to the end; unset: no limit
    std::shared_ptr<Notifier> notifier;  // told when there is news for who found none
    std::uint64_t tag = 0;               // what it is told
    bool wait_for_room = false;          // when the queue is full, instead of a QueueFullError

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

    // Waits for the end and takes what a score, an embedding or a saved state consists of. Throws what ended it early.
    std::vector<float> take_values(const Poll& poll = {});
    std::string take_state(const Poll& poll = {});

   private:
    void wait(const Poll& poll);

    std::shared_ptr<EngineCore> engine_;
    std::shared_ptr<Request> request_;
};

struct EngineStats {
    std::uint64_t requests_submitted = 0;
    std::uint64_t requests_finished = 0;
    std::uint64_t requests_running = 0;
    std::uint64_t requests_waiting = 0;
    std::uint64_t requests_preempted = 0;  // went back to the queue, because a shared pool was full
    std::uint64_t prompt_tokens = 0;     // computed
    std::uint64_t cached_tokens = 0;     // of prompts, not computed again
    std::uint64_t generated_tokens = 0;
    std::uint64_t draft_tokens = 0;      // proposed by speculative decoding
    std::uint64_t draft_tokens_accepted = 0;
    std::uint64_t decode_calls = 0;
    double decode_seconds = 0;           // in llama_decode
    double sample_seconds = 0;
};

// Computes many requests in one batch, on one thread of its own.
class Engine : public ModelUser {
   public:
    // `draft_model`: for speculative decoding without lookup; it stays usable by others, and must stay open as long as the engine.
    static std::shared_ptr<Engine> create(const std::shared_ptr<Model>& model, const EngineOptions& options,
                                          const std::shared_ptr<Model>& draft_model = nullptr, const Poll& poll = {});
    // With a decoder that computes nothing: for measuring what everything else costs.
    static std::shared_ptr<Engine> create_idle(const std::shared_ptr<Model>& model, const EngineOptions& options, const Poll& poll = {});
    ~Engine() override;

    // `poll` is for waiting for room in the queue.
    std::unique_ptr<Generation> submit(std::vector<std::int32_t> prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery = {},
                                       const Poll& poll = {});
    std::unique_ptr<Generation> submit(const std::string& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery = {},
                                       const Poll& poll = {});

    // The log-probability of each token but the first, given those before it.
    std::unique_ptr<Generation> submit_score(std::vector<std::int32_t> prompt, const DeliveryOptions& delivery = {}, const Poll& poll = {});
    std::unique_ptr<Generation> submit_embed(std::vector<std::int32_t> prompt, const EmbeddingOptions& embedding, const DeliveryOptions& delivery = {},
                                             const Poll& poll = {});

    // Computes a prompt and returns its KV cache, for load_prefix() of an engine with the same model, sequences and KV type.
    std::string save_prefix(std::vector<std::int32_t> prompt, const Poll& poll = {});
    // From now on prompts that begin like a saved one are computed from there. Returns its length in tokens.
    int load_prefix(std::string_view data, const Poll& poll = {});
    void clear_prefixes(const Poll& poll = {});

    std::vector<MemoryRow> memory(const Poll& poll = {});
    std::vector<BreakdownRow> breakdown(const Poll& poll = {});
    EngineStats stats() const;
    const ContextLimits& limits() const { return limits_; }
    int embedding_size() const;

    // Counts, from the next batch on, which experts the model's routers choose. A draft model's are not counted.
    std::shared_ptr<RoutingTrace> start_trace(const TraceOptions& options);
    void end_trace(const std::shared_ptr<RoutingTrace>& trace);

    // Cancels what runs and waits for the engine's thread. Idempotent.
    void close() override;
    bool closed() const;
    // Whether it can compute nothing any more, because a device or llama.cpp failed under it. Not once it is closed.
    bool lost() const;

   private:
    Engine() = default;
    static std::shared_ptr<Engine> start(const std::shared_ptr<Model>& model, const EngineOptions& options, std::shared_ptr<EngineCore> core,
                                         const Poll& poll);
    std::unique_ptr<Generation> submit(RequestKind kind, std::vector<std::int32_t> prompt, const SamplingOptions& sampling,
                                       const EmbeddingOptions& embedding, const DeliveryOptions& delivery, const Poll& poll);
    void check_prompt(const std::vector<std::int32_t>& prompt) const;

    std::shared_ptr<Model> model_;
    std::shared_ptr<Model> draft_model_;
    std::shared_ptr<EngineCore> core_;
    std::shared_ptr<RoutingHub> routing_;
    EngineOptions options_;
    ContextLimits limits_{};
};

}  // namespace llama_moe
