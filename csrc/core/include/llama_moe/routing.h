#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "llama_moe/gguf_file.h"

namespace llama_moe {

// Which experts a model has, and how many compute each token.
struct RoutingShape {
    int layers = 0;
    int experts = 0;
    int used = 0;
    std::vector<int> moe_layers;  // the layers that have experts, ascending
};
RoutingShape routing_shape(const GgufInfo& gguf);

// In choices: no expert is known. A last layer computes only the tokens whose logits are wanted.
constexpr std::uint16_t kNoExpert = 0xFFFF;

struct RoutedToken {
    std::int32_t token;
    std::int32_t position;
    std::int32_t sequence;  // -1: not known
    std::int64_t request;   // of an engine: how many were submitted before it; -1: not known, or none
};

// What the routers of a model chose for some tokens. This is what a source hands to the traces: the reader of llama.cpp's graphs, or
// a backend that computes the experts.
struct RoutedTokens {
    std::vector<RoutedToken> tokens;
    std::vector<std::int64_t> counts;    // [layers * experts]
    std::vector<std::uint16_t> choices;  // [tokens, moe_layers, used], the first expert of a token first; empty: nobody asked
    std::vector<float> weights;          // the same; NaN where there is no choice
};

struct TraceOptions {
    bool choices = false;  // keep them for each token
    bool weights = false;  // and the weights of the chosen experts
};

// What was routed while it ran. Any thread may read it, also while it runs and after the engine is gone.
class RoutingTrace {
   public:
    RoutingTrace(const RoutingShape& shape, const TraceOptions& options, std::int64_t first_request);

    const RoutingShape& shape() const { return shape_; }
    const TraceOptions& options() const { return options_; }
    std::int64_t first_request() const { return first_request_; }  // how many were submitted when it began
    bool active() const;

    struct Counts {
        std::int64_t tokens = 0;
        std::vector<std::int64_t> counts;  // [layers * experts]
    };
    Counts counts() const;
    // Everything, of one moment.
    Counts records(RoutedTokens& records) const;

    // Counts some tokens, unless it has ended.
    void add(const RoutedTokens& routed);
    void end();

   private:
    const RoutingShape shape_;
    const TraceOptions options_;
    const std::int64_t first_request_;
    mutable std::mutex mutex_;  // the last one taken
    bool active_ = true;
    std::int64_t tokens_ = 0;
    RoutedTokens routed_;  // tokens, choices and weights only on request
};

// The traces of one engine or context. Any thread starts and ends them; the one that computes delivers.
class RoutingHub {
   public:
    explicit RoutingHub(RoutingShape shape) : shape_(std::move(shape)) {}

    const RoutingShape& shape() const { return shape_; }
    // Throws InvalidOptionError for a model without experts.
    std::shared_ptr<RoutingTrace> start(const TraceOptions& options, std::int64_t first_request);
    void end(const std::shared_ptr<RoutingTrace>& trace);

    // Those that run now. Costs next to nothing when there are none.
    std::vector<std::shared_ptr<RoutingTrace>> active() const;

   private:
    const RoutingShape shape_;
    std::atomic<int> count_{0};
    mutable std::mutex mutex_;
    std::vector<std::shared_ptr<RoutingTrace>> traces_;
};

}  // namespace llama_moe
