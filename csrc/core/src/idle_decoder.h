#pragma once

#include "decoder.h"
#include "llama_moe/engine.h"

namespace llama_moe {

// Computes nothing: every token's logits are the same. What an engine over it takes is its own cost.
class IdleDecoder : public Decoder {
   public:
    IdleDecoder(int vocab_size, std::int32_t token, const EngineOptions& options)
        : limits_{options.context_size, options.max_sequences, options.batch_size, options.micro_batch_size, 1, 1},
          logits_(static_cast<std::size_t>(vocab_size)) {
        logits_[static_cast<std::size_t>(token)] = 1.0f;
    }

    const ContextLimits& limits() const override { return limits_; }
    int max_outputs() const override { return limits_.batch_size; }
    bool can_truncate() const override { return true; }
    bool shares_cells() const override { return true; }
    int embedding_size() const override { return 1; }
    DecodeStatus decode(const std::vector<BatchToken>& /*batch*/, bool /*embeddings*/) override { return DecodeStatus::done; }
    const float* logits(int /*index*/) override { return logits_.data(); }
    const float* embedding(int /*index*/) override { return logits_.data(); }
    bool truncate(int /*sequence*/, int /*length*/) override { return true; }
    void copy(int /*source*/, int /*destination*/) override {}
    std::string save(int /*sequence*/) override { return {}; }
    bool restore(int /*sequence*/, const std::vector<std::int32_t>& /*tokens*/, const std::string& /*state*/) override { return true; }

   private:
    ContextLimits limits_;
    std::vector<float> logits_;
};

}  // namespace llama_moe
