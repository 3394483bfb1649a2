#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "llama_moe/context_options.h"
#include "llama_moe/memory.h"
#include "llama_moe/model.h"
#include "llama_moe/routing.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// What a context really has after llama.cpp rounded the options.
struct ContextLimits {
    int context_size;
    int max_sequences;
    int batch_size;
    int micro_batch_size;
    int threads;
    int threads_batch;
};

enum class Outputs { last, all, mask };

struct DecodeInput {
    std::vector<std::int32_t> tokens;
    std::optional<std::vector<std::int32_t>> positions;     // unset: each sequence goes on where it ended
    std::optional<std::vector<std::int32_t>> sequence_ids;  // unset: all of sequence 0
    Outputs outputs = Outputs::last;                        // last: the last token of each sequence
    std::vector<std::uint8_t> mask;                         // for Outputs::mask, one per token
};

struct Logits {
    std::size_t rows = 0;
    std::size_t columns = 0;
    std::vector<float> values;  // row-major
};

// The low level: sequences in a KV cache, tokens in, logits out. One call runs at a time, on the context's own thread.
class Context : public ModelUser {
   public:
    static std::shared_ptr<Context> create(const std::shared_ptr<Model>& model, const ContextOptions& options, const Poll& poll = {});
    ~Context() override;

    // After a failure or an interrupt each sequence is cut back to where it was before the call.
    std::shared_ptr<Logits> decode(DecodeInput input, const Poll& poll = {});

    void remove(int sequence, int start, int end, const Poll& poll = {});  // [start, end); end -1: to the last; sequence -1: all
    void copy(int source, int destination, int start, int end, const Poll& poll = {});
    void keep(int sequence, const Poll& poll = {});
    void clear(const Poll& poll = {});
    int sequence_length(int sequence, const Poll& poll = {});

    std::string save_state(int sequence, const Poll& poll = {});  // sequence -1: the whole context
    void load_state(std::string_view data, int sequence, const Poll& poll = {});

    std::vector<MemoryRow> memory(const Poll& poll = {});
    std::vector<BreakdownRow> breakdown(const Poll& poll = {});
    const ContextLimits& limits() const { return limits_; }

    // Counts, from the next batch on, which experts the model's routers choose.
    std::shared_ptr<RoutingTrace> start_trace(const TraceOptions& options);
    void end_trace(const std::shared_ptr<RoutingTrace>& trace);

    void close() override;
    bool closed() const;

   private:
    struct State;
    Context() = default;
    void run(const std::function<void(State&)>& task, const Poll& poll);
    void check_sequence(int sequence, bool allow_all) const;

    std::shared_ptr<State> state_;
    std::shared_ptr<RoutingHub> routing_;
    ContextLimits limits_{};
};

}  // namespace llama_moe
