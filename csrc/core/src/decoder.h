#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama_moe/context.h"
#include "llama_moe/memory.h"

namespace llama_moe {

struct BatchToken {
    std::int32_t token;
    int position;
    int sequence;
    bool output;  // its logits, or its embedding, are wanted
    std::int64_t request = -1;  // the number of its request; -1: none
};

// Tokens that may follow those of a sequence, to be verified by the model.
struct Draft {
    int sequence;
    const std::vector<std::int32_t>* cached;  // what the sequence holds
    std::int32_t last;                        // the token that comes next and is not in the cache yet
    int most;                                 // tokens wanted at the most
    std::vector<std::int32_t>* tokens;        // out; empty before
};

enum class DecodeStatus { done, full, aborted, failed };

// What the scheduler needs of a model and its KV cache. NativeDecoder is llama.cpp; tests simulate one. Of one thread.
class Decoder {
   public:
    virtual ~Decoder() = default;

    virtual const ContextLimits& limits() const = 0;
    virtual int max_outputs() const = 0;      // of one batch
    virtual int max_draft() const { return 0; }
    virtual bool can_truncate() const = 0;    // a sequence can lose its end; without that, only all of it
    virtual bool shares_cells() const = 0;    // sequences share one pool, and a copy costs nothing
    virtual int embedding_size() const = 0;

    // `embeddings`: every token's embedding is computed, whatever its `output` says.
    virtual DecodeStatus decode(const std::vector<BatchToken>& batch, bool embeddings) = 0;
    // Of the last batch's token `index`, which had `output`. Valid until the next call of decode().
    virtual const float* logits(int index) = 0;
    virtual const float* embedding(int index) = 0;

    // Keeps the first `length` tokens. Returns false when all had to go.
    virtual bool truncate(int sequence, int length) = 0;
    virtual void copy(int source, int destination) = 0;
    virtual void draft(std::vector<Draft>& /*drafts*/) {}
    virtual void accepted(int /*sequence*/, int /*count*/) {}

    virtual std::string save(int sequence) = 0;
    // Returns false, with the sequence empty, when the state does not fit this cache, or there is no room in a shared pool.
    virtual bool restore(int sequence, const std::vector<std::int32_t>& tokens, const std::string& state) = 0;

    virtual std::vector<MemoryRow> memory_rows() const { return {}; }
    virtual std::vector<BreakdownRow> breakdown() const { return {}; }

    // After an exception was thrown through llama.cpp: nothing of it is touched again, not even to free it.
    virtual void abandon() {}
};

}  // namespace llama_moe
