#pragma once

#include <functional>
#include <memory>

#include "decoder.h"
#include "llama_moe/engine.h"
#include "native_context.h"
#include "speculation.h"

namespace llama_moe {

// How an engine uses its context.
NativeContextUse engine_use(const LoadedModel& model, const EngineOptions& options, std::shared_ptr<RoutingHub> routing = nullptr);

// llama.cpp as a Decoder: a context, and what speculative decoding needs beside it.
class NativeDecoder : public Decoder {
   public:
    NativeDecoder(std::shared_ptr<LoadedModel> model, std::shared_ptr<LoadedModel> draft_model, const EngineOptions& options,
                  std::shared_ptr<RoutingHub> routing, const std::function<bool()>& should_abort);

    const ContextLimits& limits() const override { return context_.limits(); }
    int max_outputs() const override { return max_outputs_; }
    int max_draft() const override { return max_draft_; }
    bool can_truncate() const override { return can_truncate_; }
    bool shares_cells() const override { return shares_cells_; }
    int embedding_size() const override;

    DecodeStatus decode(const std::vector<BatchToken>& batch, bool embeddings) override;
    const float* logits(int index) override { return llama_get_logits_ith(context_.get(), index); }
    const float* embedding(int index) override { return llama_get_embeddings_ith(context_.get(), index); }
    bool truncate(int sequence, int length) override;
    void copy(int source, int destination) override;
    void draft(std::vector<Draft>& drafts) override;
    void accepted(int sequence, int count) override;
    std::string save(int sequence) override;
    bool restore(int sequence, const std::vector<std::int32_t>& tokens, const std::string& state) override;
    std::vector<MemoryRow> memory_rows() const override;
    std::vector<BreakdownRow> breakdown() const override;
    void abandon() override;

   private:
    bool holds(int sequence, int length) const;

    const std::function<bool()> should_abort_;
    const int max_draft_;
    const int max_outputs_;
    const bool can_truncate_;
    const bool shares_cells_;
    NativeContext context_;
    Batch batch_;
    std::unique_ptr<Speculation> speculation_;
    bool computes_embeddings_ = false;
};

}  // namespace llama_moe
