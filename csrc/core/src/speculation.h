#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "decoder.h"
#include "llama_moe/engine.h"
#include "native_context.h"

namespace llama_moe {

// Drafts tokens with llama.cpp's speculative code (common/speculative.h; only speculation.cpp includes it): by looking the last
// tokens up in the text so far, or with a smaller model, whose KV cache follows that of the target token by token.
class Speculation {
   public:
    // `draft_model`: none for lookup.
    Speculation(NativeContext& target, std::shared_ptr<LoadedModel> draft_model, const EngineOptions& options, std::function<bool()> should_abort);
    ~Speculation();

    // The target decoded this. Returns false when the draft model could not.
    bool process(const std::vector<BatchToken>& batch);
    // As if the target had decoded these as a new sequence.
    bool compute(int sequence, const std::vector<std::int32_t>& tokens);
    void draft(std::vector<Draft>& drafts);
    void accepted(int sequence, int count);
    void truncate(int sequence, int length);
    void copy(int source, int destination);
    void add_memory(std::vector<MemoryRow>& rows) const;
    void abandon();

   private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace llama_moe
