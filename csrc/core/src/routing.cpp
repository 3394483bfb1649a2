#include "llama_moe/routing.h"

#include <algorithm>
#include <set>

#include "llama_moe/error.h"
#include "llama_moe/process.h"

namespace llama_moe {

RoutingShape routing_shape(const GgufInfo& gguf) {
    RoutingShape shape{gguf.layer_count, gguf.expert_count, gguf.experts_used, {}};
    std::set<int> layers;
    for (const auto& tensor : gguf.tensors) {
        if (tensor.role == TensorRole::experts && tensor.layer >= 0 && tensor.layer < gguf.layer_count - gguf.nextn_layer_count) {
            layers.insert(tensor.layer);
        }
    }
    shape.moe_layers.assign(layers.begin(), layers.end());
    return shape;
}

RoutingTrace::RoutingTrace(const RoutingShape& shape, const TraceOptions& options, std::int64_t first_request)
    : shape_(shape), options_(options), first_request_(first_request) {
    routed_.counts.resize(static_cast<std::size_t>(shape.layers) * static_cast<std::size_t>(shape.experts));
}

bool RoutingTrace::active() const {
    require_same_process("the routing trace");
    std::lock_guard<std::mutex> lock(mutex_);
    return active_;
}

RoutingTrace::Counts RoutingTrace::counts() const {
    require_same_process("the routing trace");
    std::lock_guard<std::mutex> lock(mutex_);
    return {tokens_, routed_.counts};
}

RoutingTrace::Counts RoutingTrace::records(RoutedTokens& records) const {
    require_same_process("the routing trace");
    std::lock_guard<std::mutex> lock(mutex_);
    records = routed_;
    return {tokens_, routed_.counts};
}

void RoutingTrace::add(const RoutedTokens& routed) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!active_) {
        return;
    }
    tokens_ += static_cast<std::int64_t>(routed.tokens.size());
    for (std::size_t i = 0; i < routed.counts.size(); i++) {
        routed_.counts[i] += routed.counts[i];
    }
    const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    if (options_.choices || options_.weights) {
        append(routed_.tokens, routed.tokens);
    }
    if (options_.choices) {
        append(routed_.choices, routed.choices);
    }
    if (options_.weights) {
        append(routed_.weights, routed.weights);
    }
}

void RoutingTrace::end() {
    std::lock_guard<std::mutex> lock(mutex_);
    active_ = false;
}

std::shared_ptr<RoutingTrace> RoutingHub::start(const TraceOptions& options, std::int64_t first_request) {
    if (shape_.moe_layers.empty()) {
        throw InvalidOptionError("this model has no experts, so there is no routing to trace; a Mixture-of-Experts model has some");
    }
    if (shape_.experts >= kNoExpert) {
        throw InvalidOptionError("the model has " + std::to_string(shape_.experts) + " experts; at most " + std::to_string(kNoExpert - 1) + " can be traced");
    }
    auto trace = std::make_shared<RoutingTrace>(shape_, options, first_request);
    std::lock_guard<std::mutex> lock(mutex_);
    traces_.push_back(trace);
    count_ = static_cast<int>(traces_.size());
    return trace;
}

void RoutingHub::end(const std::shared_ptr<RoutingTrace>& trace) {
    trace->end();
    std::lock_guard<std::mutex> lock(mutex_);
    traces_.erase(std::remove(traces_.begin(), traces_.end(), trace), traces_.end());
    count_ = static_cast<int>(traces_.size());
}

std::vector<std::shared_ptr<RoutingTrace>> RoutingHub::active() const {
    if (count_ == 0) {
        return {};
    }
    std::lock_guard<std::mutex> lock(mutex_);
    return traces_;
}

}  // namespace llama_moe
