#include "llama_moe/context.h"

#include <algorithm>
#include <atomic>
#include <map>

#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "native_context.h"
#include "native_thread.h"
#include "saved_state.h"

namespace llama_moe {
struct Context::State : std::enable_shared_from_this<Context::State> {
    explicit State(const LoadedModel& model) : devices(model.devices), thread(model.devices) {}

    const std::vector<ggml_backend_dev_t> devices;
    std::unique_ptr<NativeContext> context;
    std::unique_ptr<Batch> batch;
    std::atomic<const std::atomic<bool>*> cancelled{nullptr};  // of the running call; unset between calls
    std::atomic<bool> closed{false};
    std::string broken;  // why the context cannot be used any more
    NativeThread thread;  // last: it stops before the rest goes

    void decode(const DecodeInput& input, Logits& logits);
    void decode_chunk(const DecodeInput& input, std::size_t begin, std::size_t end, const std::vector<std::int32_t>& positions,
                      const std::vector<std::uint8_t>& wanted, Logits& logits);
    struct RunningCall {
        RunningCall(State& owner, const std::atomic<bool>& flag) : state(owner) { state.cancelled = &flag; }
        ~RunningCall() { state.cancelled = nullptr; }
        RunningCall(const RunningCall&) = delete;
        RunningCall& operator=(const RunningCall&) = delete;
        State& state;
    };
    bool interrupted() const {
        const auto* flag = cancelled.load();
        return closed || (flag != nullptr && flag->load());
    }
    int next_position(int sequence) const { return llama_memory_seq_pos_max(context->memory(), sequence) + 1; }
};

namespace {

int sequence_of(const DecodeInput& input, std::size_t i) {
    return input.sequence_ids ? (*input.sequence_ids)[i] : 0;
}

void check_input(const DecodeInput& input, int vocab_size, int max_sequences) {
    const std::size_t count = input.tokens.size();
    const auto check_size = [count](const char* name, std::size_t size) {
        if (size != count) {
            throw InvalidOptionError(std::string(name) + " has " + std::to_string(size) + " entries for " + std::to_string(count) + " tokens");
        }
    };
    if (count == 0) {
        throw InvalidOptionError("tokens is empty; give at least one");
    }
    if (input.positions) {
        check_size("positions", input.positions->size());
    }
    if (input.sequence_ids) {
        check_size("sequence_ids", input.sequence_ids->size());
    }
    if (input.outputs == Outputs::mask) {
        check_size("outputs", input.mask.size());
    }
    for (std::size_t i = 0; i < count; i++) {
        if (input.tokens[i] < 0 || input.tokens[i] >= vocab_size) {
            throw InvalidOptionError("tokens[" + std::to_string(i) + "] is " + std::to_string(input.tokens[i]) +
                                     "; the vocabulary has the tokens 0 to " + std::to_string(vocab_size - 1));
        }
        const int sequence = sequence_of(input, i);
        if (sequence < 0 || sequence >= max_sequences) {
            throw InvalidOptionError("sequence_ids[" + std::to_string(i) + "] is " + std::to_string(sequence) + "; the context has the sequences 0 to " +
                                     std::to_string(max_sequences - 1));
        }
    }
}

std::vector<std::uint8_t> wanted_outputs(const DecodeInput& input) {
    const std::size_t count = input.tokens.size();
    if (input.outputs == Outputs::mask) {
        return input.mask;
    }
    std::vector<std::uint8_t> wanted(count, input.outputs == Outputs::all ? 1 : 0);
    if (input.outputs == Outputs::last) {
        std::map<int, std::size_t> last;
        for (std::size_t i = 0; i < count; i++) {
            last[sequence_of(input, i)] = i;
        }
        for (const auto& [sequence, i] : last) {
            wanted[i] = 1;
        }
    }
    return wanted;
}

}  // namespace

void Context::State::decode(const DecodeInput& input, Logits& logits) {
    const auto& limits = context->limits();
    check_input(input, llama_vocab_n_tokens(context->model().vocab), limits.max_sequences);
    std::map<int, int> start;  // where each sequence ended before
    std::map<int, int> next;
    std::vector<std::int32_t> positions(input.tokens.size());
    for (std::size_t i = 0; i < input.tokens.size(); i++) {
        const int sequence = sequence_of(input, i);
        if (start.count(sequence) == 0) {
            start[sequence] = next[sequence] = next_position(sequence);
        }
        positions[i] = input.positions ? (*input.positions)[i] : next[sequence];
        if (positions[i] != next[sequence]) {
            throw InvalidOptionError("positions[" + std::to_string(i) + "] is " + std::to_string(positions[i]) + "; sequence " +
                                     std::to_string(sequence) + " goes on at " + std::to_string(next[sequence]) +
                                     " (remove what is there first to go back)");
        }
        next[sequence]++;
        if (positions[i] >= limits.context_size) {
            throw ContextFullError("sequence " + std::to_string(sequence) + " would have " + std::to_string(positions[i] + 1) +
                                   " tokens; the context holds " + std::to_string(limits.context_size));
        }
    }
    const auto wanted = wanted_outputs(input);
    logits.columns = static_cast<std::size_t>(llama_vocab_n_tokens(context->model().vocab));
    logits.values.reserve(static_cast<std::size_t>(std::count(wanted.begin(), wanted.end(), 1)) * logits.columns);
    const auto chunk = static_cast<std::size_t>(limits.batch_size);
    try {
        for (std::size_t begin = 0; begin < input.tokens.size(); begin += chunk) {
            decode_chunk(input, begin, std::min(begin + chunk, input.tokens.size()), positions, wanted, logits);
        }
    } catch (const NativeAbort&) {
        throw;  // nothing may touch the context any more
    } catch (...) {
        for (const auto& [sequence, position] : start) {
            context->truncate(sequence, position);
        }
        throw;
    }
}

void Context::State::decode_chunk(const DecodeInput& input, std::size_t begin, std::size_t end, const std::vector<std::int32_t>& positions,
                                  const std::vector<std::uint8_t>& wanted, Logits& logits) {
    batch->clear();
    for (std::size_t i = begin; i < end; i++) {
        batch->add(input.tokens[i], positions[i], sequence_of(input, i), wanted[i] != 0);
    }
    batch->add_output_to_wait_for();
    ErrorLog errors;
    const ExpectedFailure quiet([this] { return interrupted(); });
    const int status = context->decode(*batch);
    if (status == 2 || interrupted()) {
        throw CancelledError("decoding was interrupted");
    }
    if (status == 1) {
        throw ContextFullError("the KV cache has no room for " + std::to_string(end - begin) + " more tokens");
    }
    if (status != 0) {
        throw DecodeError("llama.cpp could not decode " + std::to_string(end - begin) + " tokens (status " + std::to_string(status) +
                          "): " + errors.text("no reason was given"));
    }
    llama_synchronize(context->get());
    for (int i = 0; i < batch->size(); i++) {
        if (wanted[begin + static_cast<std::size_t>(i)] != 0) {
            const float* row = llama_get_logits_ith(context->get(), i);
            if (row == nullptr) {
                throw DecodeError("llama.cpp gave no logits for token " + std::to_string(i));
            }
            logits.values.insert(logits.values.end(), row, row + logits.columns);
            logits.rows++;
        }
    }
}

std::shared_ptr<Context> Context::create(const std::shared_ptr<Model>& model, const ContextOptions& options, const Poll& poll) {
    require_same_process("the model");
    options.validate();
    auto loaded = model->acquire();
    std::shared_ptr<Context> context(new Context);
    context->state_ = std::make_shared<State>(*loaded);
    context->routing_ = std::make_shared<RoutingHub>(routing_shape(model->gguf()));
    live_objects().contexts++;
    context->state_->thread.run(
        [state = context->state_.get(), loaded, options, routing = context->routing_] {
            state->context = std::make_unique<NativeContext>(loaded, options, NativeContextUse{0, 0, routing}, [state] { return state->interrupted(); });
            state->batch = std::make_unique<Batch>(state->context->limits().batch_size);
        },
        poll);
    context->limits_ = context->state_->context->limits();
    model->add_user(context);
    return context;
}

Context::~Context() {
    close();
    live_objects().contexts--;
}

void Context::run(const std::function<void(State&)>& task, const Poll& poll) {
    require_same_process("the context");
    auto state = state_;
    if (state->closed) {
        throw ClosedError("the context is closed");
    }
    // Each call has a flag of its own: who stops waiting stops that call, which may still be behind another.
    auto cancelled = std::make_shared<std::atomic<bool>>(false);
    // The task holds a bare pointer: the thread belongs to the state, and the state waits for it.
    state->thread.run(
        [state = state.get(), task, cancelled] {
            if (!state->context || state->closed) {
                throw ClosedError("the context is closed");
            }
            if (!state->broken.empty()) {
                throw DecodeError("the context was lost in an earlier failure: " + state->broken);
            }
            if (*cancelled) {
                throw CancelledError("the call was interrupted before it began");
            }
            const State::RunningCall running(*state, *cancelled);
            try {
                task(*state);
            } catch (const NativeAbort& abort) {
                state->broken = abort.what();
                state->context->abandon();
                throw DecodeError(std::string("the context is lost: ") + abort.what());
            }
        },
        poll, [cancelled] { *cancelled = true; });
}

std::shared_ptr<Logits> Context::decode(DecodeInput input, const Poll& poll) {
    auto logits = std::make_shared<Logits>();
    run([logits, input = std::move(input)](State& state) { state.decode(input, *logits); }, poll);
    return logits;
}

void Context::check_sequence(int sequence, bool allow_all) const {
    if (sequence >= limits_.max_sequences || sequence < (allow_all ? -1 : 0)) {
        throw InvalidOptionError("there is no sequence " + std::to_string(sequence) + "; the context has the sequences 0 to " +
                                 std::to_string(limits_.max_sequences - 1));
    }
}

void Context::remove(int sequence, int start, int end, const Poll& poll) {
    check_sequence(sequence, true);
    run(
        [=](State& state) {
            if (!llama_memory_seq_rm(state.context->memory(), sequence, start, end)) {
                throw InvalidOptionError("this model's memory cannot remove a part of a sequence; remove all of it");
            }
        },
        poll);
}

void Context::copy(int source, int destination, int start, int end, const Poll& poll) {
    check_sequence(source, false);
    check_sequence(destination, false);
    if (start > 0 || end >= 0) {
        // With a KV buffer for each sequence, llama.cpp copies whole sequences only and asserts otherwise.
        const int length = sequence_length(source, poll);
        if (start > 0 || end < length) {
            throw InvalidOptionError("only a whole sequence can be copied; copy it and remove what is not needed");
        }
    }
    run(
        [=](State& state) {
            if (source != destination) {
                llama_memory_seq_rm(state.context->memory(), destination, -1, -1);
                llama_memory_seq_cp(state.context->memory(), source, destination, -1, -1);
            }
        },
        poll);
}

void Context::keep(int sequence, const Poll& poll) {
    check_sequence(sequence, false);
    // Not llama_memory_seq_keep: with a KV buffer for each sequence it looks only at the kept one's buffer.
    run(
        [this, sequence](State& state) {
            for (int other = 0; other < limits_.max_sequences; other++) {
                if (other != sequence) {
                    llama_memory_seq_rm(state.context->memory(), other, -1, -1);
                }
            }
        },
        poll);
}

void Context::clear(const Poll& poll) {
    run([](State& state) { llama_memory_clear(state.context->memory(), false); }, poll);
}

int Context::sequence_length(int sequence, const Poll& poll) {
    check_sequence(sequence, false);
    auto length = std::make_shared<int>(0);
    run([length, sequence](State& state) { *length = state.next_position(sequence); }, poll);
    return *length;
}

std::string Context::save_state(int sequence, const Poll& poll) {
    check_sequence(sequence, true);
    auto saved = std::make_shared<std::string>();
    run(
        [saved, sequence](State& state) {
            auto* native = state.context->get();
            const std::size_t size = sequence < 0 ? llama_state_get_size(native) : llama_state_seq_get_size(native, sequence);
            saved->resize(kStateHeaderBytes + size);
            auto* payload = reinterpret_cast<std::uint8_t*>(saved->data() + kStateHeaderBytes);
            const std::size_t written =
                sequence < 0 ? llama_state_get_data(native, payload, size) : llama_state_seq_get_data(native, payload, size, sequence);
            if (written == 0 && size > 0) {
                throw DecodeError("llama.cpp could not save the state of sequence " + std::to_string(sequence));
            }
            saved->resize(kStateHeaderBytes + written);
            write_state_header(*saved, sequence < 0 ? StateKind::context : StateKind::sequence, state.context->model().fingerprint);
        },
        poll);
    return std::move(*saved);
}

void Context::load_state(std::string_view data, int sequence, const Poll& poll) {
    check_sequence(sequence, true);
    unpack_state(data, sequence < 0 ? StateKind::context : StateKind::sequence);
    auto copy = std::make_shared<std::string>(data);
    run(
        [copy, sequence](State& state) {
            check_state_model(*copy, state.context->model().fingerprint);
            auto* native = state.context->get();
            const auto* payload = reinterpret_cast<const std::uint8_t*>(copy->data() + kStateHeaderBytes);
            const std::size_t bytes = copy->size() - kStateHeaderBytes;
            ErrorLog errors;
            const std::size_t read =
                sequence < 0 ? llama_state_set_data(native, payload, bytes) : llama_state_seq_set_data(native, payload, bytes, sequence);
            if (read == 0 && bytes > 0) {
                throw InvalidOptionError("the saved state does not fit this context: " + errors.text("its size or KV type differs"));
            }
        },
        poll);
}

std::vector<MemoryRow> Context::memory(const Poll& poll) {
    auto rows = std::make_shared<std::vector<MemoryRow>>();
    run([rows](State& state) { *rows = state.context->memory_rows(); }, poll);
    return *rows;
}

std::vector<BreakdownRow> Context::breakdown(const Poll& poll) {
    auto rows = std::make_shared<std::vector<BreakdownRow>>();
    run([rows](State& state) { *rows = state.context->breakdown(); }, poll);
    return *rows;
}

std::shared_ptr<RoutingTrace> Context::start_trace(const TraceOptions& options) {
    require_same_process("the context");
    if (closed()) {
        throw ClosedError("the context is closed");
    }
    return routing_->start(options, 0);
}

void Context::end_trace(const std::shared_ptr<RoutingTrace>& trace) {
    if (!forked()) {
        routing_->end(trace);
    }
}

void Context::close() {
    if (forked() || !state_ || state_->closed.exchange(true)) {
        return;
    }
    try {
        state_->thread.run([state = state_.get()] { state->context.reset(); }, within_close_limit(state_->devices));
    } catch (const std::exception& error) {
        // The context is on a device that failed or does not answer: what it holds can only be left behind. Should the device
        // answer after all, that task frees it.
        new std::shared_ptr<State>(state_);
        log_line(LogLevel::error, std::string("a context could not be freed: ") + error.what());
    }
}

bool Context::closed() const {
    return forked() || state_->closed;
}

}  // namespace llama_moe
