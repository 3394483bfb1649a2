#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu_threads.h"
#include "llama.h"
#include "llama_moe/context.h"
#include "llama_moe/error.h"
#include "llama_moe/memory.h"
#include "llama_moe/routing.h"
#include "loaded_model.h"
#include "routing_reader.h"
#include "worker_graphs.h"

namespace llama_moe {

// What an engine's context has besides its options.
struct NativeContextUse {
    int max_outputs = 0;   // rows of logits of one call at the most, which bounds a buffer; 0: batch_size
    int context_pool = 0;  // tokens that all sequences share; 0: a buffer of context_size for each
    std::shared_ptr<RoutingHub> routing = nullptr;  // whose traces see what is computed; none: nobody's
};

class Batch;

// The model is of a kind that generates nothing here.
class NoDecoderError : public InvalidOptionError {
    using InvalidOptionError::InvalidOptionError;
};

// Owns a llama_context and keeps its model. Made, used and destroyed inside a NativeScope.
class NativeContext {
   public:
    // `should_abort` is asked between the operations of a graph on the CPU; true stops the decode.
    NativeContext(std::shared_ptr<LoadedModel> model, const ContextOptions& options, const NativeContextUse& use,
                  std::function<bool()> should_abort);
    ~NativeContext();
    NativeContext(const NativeContext&) = delete;
    NativeContext& operator=(const NativeContext&) = delete;

    llama_context* get() const { return context_; }
    llama_memory_t memory() const { return llama_get_memory(context_); }
    const LoadedModel& model() const { return *model_; }
    const ContextLimits& limits() const { return limits_; }
    std::vector<BreakdownRow> breakdown() const;
    std::vector<MemoryRow> memory_rows() const;

    // llama_decode, traced if there are traces. Returns its status.
    int decode(const Batch& batch);

    // After an exception was thrown through llama.cpp nothing may touch the context again, not even to free it.
    void abandon();

    // Removes [start, ...) of a sequence; all of it when the memory cannot remove a part (recurrent models).
    void truncate(int sequence, int start);

   private:
    std::string add_loras();

    std::shared_ptr<LoadedModel> model_;
    WorkerUse worker_use_;
    std::function<bool()> should_abort_;
    std::unique_ptr<CpuThreads> threads_;  // ended after the context
    llama_context* context_ = nullptr;
    ContextLimits limits_{};
    std::unique_ptr<RoutingReader> routing_;
};

// The tokens of one llama_decode call; every token belongs to one sequence.
class Batch {
   public:
    explicit Batch(int capacity);
    void clear() { batch_.n_tokens = 0; }
    void add(std::int32_t token, int position, int sequence, bool output, std::int64_t request = -1);
    int size() const { return batch_.n_tokens; }
    // Wants the last token's logits where no others are wanted. A remote worker is known to be done when something is read back from it:
    // without that, calls would pile up there, and neither Ctrl-C nor close() could do anything about them.
    void add_output_to_wait_for();
    const llama_batch& get() const { return batch_; }
    std::vector<BatchRow> rows() const;

   private:
    std::vector<std::int32_t> tokens_;
    std::vector<llama_pos> positions_;
    std::vector<std::int32_t> counts_;
    std::vector<llama_seq_id> sequences_;
    std::vector<llama_seq_id*> sequence_pointers_;
    std::vector<std::int8_t> outputs_;
    std::vector<std::int64_t> requests_;
    llama_batch batch_{};
};

}  // namespace llama_moe
