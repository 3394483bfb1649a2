#include "llama_moe/engine.h"

#include <cstring>

#include "engine_core.h"
#include "idle_decoder.h"
#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/process.h"
#include "native_decoder.h"
#include "native_thread.h"
#include "saved_state.h"

namespace llama_moe {
namespace {

// What a saved prefix has between its header and llama.cpp's data. llama.cpp would find that the rest differs too, but not say
// what would be right.
struct PrefixHeader {
    std::uint32_t streams = 0;  // buffers of the KV cache
    std::uint32_t tokens = 0;
    char kv_type[16] = {};
};

PrefixHeader prefix_header(const EngineOptions& options, std::size_t tokens) {
    PrefixHeader header;
    header.streams = options.context_pool > 0 ? 1 : static_cast<std::uint32_t>(options.max_sequences);
    header.tokens = static_cast<std::uint32_t>(tokens);
    std::strncpy(header.kv_type, options.kv_type.c_str(), sizeof(header.kv_type) - 1);
    return header;
}

std::string pack_prefix(const EngineOptions& options, std::uint64_t fingerprint, const std::vector<std::int32_t>& tokens, const std::string& state) {
    const PrefixHeader header = prefix_header(options, tokens.size());
    const std::size_t token_bytes = tokens.size() * sizeof(std::int32_t);
    std::string data;
    data.reserve(kStateHeaderBytes + sizeof(header) + token_bytes + state.size());
    data.resize(kStateHeaderBytes);
    data.append(reinterpret_cast<const char*>(&header), sizeof(header));
    data.append(reinterpret_cast<const char*>(tokens.data()), token_bytes);
    data += state;
    write_state_header(data, StateKind::prefix, fingerprint);
    return data;
}

SavedPrefix unpack_prefix(const EngineOptions& options, std::string_view data) {
    const auto payload = unpack_state(data, StateKind::prefix);
    PrefixHeader header;
    if (payload.size() < sizeof(header)) {
        throw InvalidOptionError("the saved prefix is too short for its header");
    }
    std::memcpy(&header, payload.data(), sizeof(header));
    header.kv_type[sizeof(header.kv_type) - 1] = '\0';
    if (header.tokens > (payload.size() - sizeof(header)) / sizeof(std::int32_t)) {
        throw InvalidOptionError("the saved prefix says that it has " + std::to_string(header.tokens) + " tokens; it is too short for them");
    }
    const PrefixHeader own = prefix_header(options, header.tokens);
    if (std::strcmp(header.kv_type, own.kv_type) != 0) {
        throw InvalidOptionError(std::string("the saved prefix has kv_type '") + header.kv_type + "'; this engine has '" + own.kv_type + "'");
    }
    if (header.streams != own.streams) {
        throw InvalidOptionError("the saved prefix is of an engine with " + std::to_string(header.streams) + " buffers in its KV cache; this one has " +
                                 std::to_string(own.streams) + " (one for each of max_sequences, or one in all with a context_pool)");
    }
    SavedPrefix prefix;
    prefix.tokens.resize(header.tokens);
    const std::size_t token_bytes = prefix.tokens.size() * sizeof(std::int32_t);
    std::memcpy(prefix.tokens.data(), payload.data() + sizeof(header), token_bytes);
    prefix.state = payload.substr(sizeof(header) + token_bytes);
    return prefix;
}

// Counts this thread among those that a change has to wake.
class WaitingThread {
   public:
    explicit WaitingThread(Request& request) : request_(request) { request_.waiting_threads++; }
    ~WaitingThread() { request_.waiting_threads--; }
    WaitingThread(const WaitingThread&) = delete;
    WaitingThread& operator=(const WaitingThread&) = delete;

   private:
    Request& request_;
};

}  // namespace

void EngineOptions::validate() const {
    ContextOptions::validate();
    if (batch_size < max_sequences * (1 + draft_tokens)) {
        throw InvalidOptionError("batch_size is " + std::to_string(batch_size) + "; an engine needs at least one token" +
                                 (draft_tokens > 0 ? " and " + std::to_string(draft_tokens) + " drafted ones" : std::string()) + " for each of its " +
                                 std::to_string(max_sequences) + " sequences");
    }
    if (max_queue < 1) {
        throw InvalidOptionError("max_queue is " + std::to_string(max_queue) + "; it must be 1 or more");
    }
    if (context_pool < 0 || (context_pool > 0 && context_pool < std::max(context_size, 1))) {
        throw InvalidOptionError("context_pool is " + std::to_string(context_pool) + "; it must be at least context_size (" +
                                 std::to_string(context_size) + "), or None for context_size tokens of each sequence's own");
    }
    if (draft_tokens < 0 || draft_tokens > 64) {
        throw InvalidOptionError("draft_tokens is " + std::to_string(draft_tokens) + "; it must be from 1 to 64");
    }
    if (draft_ngram < 0 || draft_ngram > 64) {
        throw InvalidOptionError("draft_ngram is " + std::to_string(draft_ngram) + "; it must be from 1 to 64");
    }
    if (!(draft_min_probability >= 0.0f && draft_min_probability <= 1.0f)) {
        throw InvalidOptionError("draft_min_probability is " + std::to_string(draft_min_probability) + "; it must be from 0 to 1");
    }
}

Generation::Generation(std::shared_ptr<EngineCore> engine, std::shared_ptr<Request> request)
    : engine_(std::move(engine)), request_(std::move(request)) {
    live_objects().generations++;
}

Generation::~Generation() {
    cancel();
    live_objects().generations--;
}

Delivered Generation::take(bool wait, const Poll& poll) {
    require_same_process("the generation");
    Request& request = *request_;
    std::unique_lock<std::mutex> lock(request.mutex);
    const auto has_news = [&] { return request.finished || !request.ready.empty(); };
    if (wait) {
        const WaitingThread waiting(request);
        wait_with_poll(request.changed, lock, engine_->checked(poll), has_news, request.deadline);
    }
    if (!has_news() && request.past_deadline()) {
        lock.unlock();
        if (request.fail_by_timeout()) {
            engine_->cancel(request);
        }
        lock.lock();
    }
    Delivered delivered;
    if (!request.cancelled) {
        delivered.tokens.swap(request.ready);
    }
    if (delivered.tokens.empty() && request.error) {
        std::rethrow_exception(request.error);
    }
    delivered.ended = request.finished && !request.error;
    request.notify = !wait && request.notifier && delivered.tokens.empty() && !delivered.ended;
    return delivered;
}

void Generation::cancel() {
    if (!forked()) {
        engine_->cancel(*request_);
    }
}

void Generation::check_lost() {
    require_same_process("the generation");
    engine_->check_lost();
}

GenerationResult Generation::result() const {
    require_same_process("the generation");
    std::lock_guard<std::mutex> lock(request_->mutex);
    if (!request_->finished) {
        throw Error("the generation is still running; read it to its end or cancel it first");
    }
    return request_->result;
}

void Generation::wait(const Poll& poll) {
    // The engine's close() ends a request as if it had been cancelled.
    if (!take(true, poll).ended || request_->cancelled || result().finish_reason == "cancelled") {
        throw CancelledError("the request was cancelled before it had a result");
    }
}

std::vector<float> Generation::take_values(const Poll& poll) {
    wait(poll);
    return std::move(request_->values);
}

std::string Generation::take_state(const Poll& poll) {
    wait(poll);
    return std::move(request_->state);
}

std::shared_ptr<Engine> Engine::start(const std::shared_ptr<Model>& model, const EngineOptions& options, std::shared_ptr<EngineCore> core,
                                      const Poll& poll) {
    std::shared_ptr<Engine> engine(new Engine);
    live_objects().engines++;
    engine->model_ = model;
    engine->options_ = options;
    engine->core_ = std::move(core);
    engine->core_->start(poll);
    engine->limits_ = engine->core_->limits();
    model->add_user(engine);
    return engine;
}

std::shared_ptr<Engine> Engine::create(const std::shared_ptr<Model>& model, const EngineOptions& options, const std::shared_ptr<Model>& draft_model,
                                       const Poll& poll) {
    require_same_process("the model");
    options.validate();
    const auto loaded = model->acquire();
    const auto loaded_draft = draft_model ? draft_model->acquire() : nullptr;
    auto devices = loaded->devices;
    if (loaded_draft) {
        devices.insert(devices.end(), loaded_draft->devices.begin(), loaded_draft->devices.end());
    }
    auto routing = std::make_shared<RoutingHub>(routing_shape(model->gguf()));
    const auto make_decoder = [loaded, loaded_draft, options, routing](const std::function<bool()>& should_abort) {
        return std::make_unique<NativeDecoder>(loaded, loaded_draft, options, routing, should_abort);
    };
    auto engine = start(model, options, std::make_shared<EngineCore>(loaded, options, std::move(devices), make_decoder), poll);
    engine->routing_ = std::move(routing);
    if (draft_model) {
        engine->draft_model_ = draft_model;
        draft_model->add_user(engine);
    }
    return engine;
}

std::shared_ptr<Engine> Engine::create_idle(const std::shared_ptr<Model>& model, const EngineOptions& options, const Poll& poll) {
    require_same_process("the model");
    options.validate();
    const auto loaded = model->acquire();
    const auto make_decoder = [vocab_size = model->vocab_size(), token = model->tokenize("a", false, false).back(),
                               options](const std::function<bool()>& /*should_abort*/) {
        return std::make_unique<IdleDecoder>(vocab_size, token, options);
    };
    return start(model, options, std::make_shared<EngineCore>(loaded, options, loaded->devices, make_decoder), poll);
}

Engine::~Engine() {
    close();
    live_objects().engines--;
}

void Engine::check_prompt(const std::vector<std::int32_t>& prompt) const {
    require_same_process("the engine");
    if (closed()) {
        throw ClosedError("the engine is closed");
    }
    const int vocab_size = core_->vocabulary().size;
    if (prompt.empty()) {
        throw InvalidOptionError("the prompt is empty; give at least one token");
    }
    for (std::size_t i = 0; i < prompt.size(); i++) {
        if (prompt[i] < 0 || prompt[i] >= vocab_size) {
            throw InvalidOptionError("prompt[" + std::to_string(i) + "] is " + std::to_string(prompt[i]) + "; the vocabulary has the tokens 0 to " +
                                     std::to_string(vocab_size - 1));
        }
    }
    if (prompt.size() > static_cast<std::size_t>(limits_.context_size)) {
        throw ContextFullError("the prompt has " + std::to_string(prompt.size()) + " tokens; the context holds " +
                               std::to_string(limits_.context_size) + " for each sequence");
    }
}

std::unique_ptr<Generation> Engine::submit(RequestKind kind, std::vector<std::int32_t> prompt, const SamplingOptions& sampling,
                                           const EmbeddingOptions& embedding, const DeliveryOptions& delivery, const Poll& poll) {
    sampling.validate();
    delivery.validate();
    check_prompt(prompt);
    const auto loaded = model_->acquire();  // the vocabulary stays while a sampler is made with it
    const NativeScope scope;
    auto request = std::make_shared<Request>(kind, std::move(prompt), sampling, core_->vocabulary(), limits_.context_size, delivery);
    request->embedding = embedding;
    core_->submit(request, delivery.wait_for_room, poll);
    return std::make_unique<Generation>(core_, std::move(request));
}

std::unique_ptr<Generation> Engine::submit(std::vector<std::int32_t> prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery,
                                           const Poll& poll) {
    return submit(RequestKind::generate, std::move(prompt), sampling, {}, delivery, poll);
}

std::unique_ptr<Generation> Engine::submit(const std::string& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery, const Poll& poll) {
    require_same_process("the engine");
    if (closed()) {
        throw ClosedError("the engine is closed");
    }
    return submit(model_->tokenize(prompt, /*add_special=*/true, /*parse_special=*/true), sampling, delivery, poll);
}

std::unique_ptr<Generation> Engine::submit_score(std::vector<std::int32_t> prompt, const DeliveryOptions& delivery, const Poll& poll) {
    if (prompt.size() == 1) {
        throw InvalidOptionError("a score needs at least two tokens: the first has no probability, since nothing comes before it");
    }
    return submit(RequestKind::score, std::move(prompt), {}, {}, delivery, poll);
}

std::unique_ptr<Generation> Engine::submit_embed(std::vector<std::int32_t> prompt, const EmbeddingOptions& embedding, const DeliveryOptions& delivery,
                                                 const Poll& poll) {
    return submit(RequestKind::embed, std::move(prompt), {}, embedding, delivery, poll);
}

std::string Engine::save_prefix(std::vector<std::int32_t> prompt, const Poll& poll) {
    const auto fingerprint = model_->acquire()->fingerprint;
    auto generation = submit(RequestKind::save, prompt, {}, {}, {}, poll);
    return pack_prefix(options_, fingerprint, prompt, generation->take_state(poll));
}

int Engine::load_prefix(std::string_view data, const Poll& poll) {
    check_state_model(data, model_->acquire()->fingerprint);
    auto prefix = std::make_shared<SavedPrefix>(unpack_prefix(options_, data));
    check_prompt(prefix->tokens);
    const auto length = static_cast<int>(prefix->tokens.size());
    core_->run([prefix](Decoder&, Scheduler& scheduler) { scheduler.add_saved_prefix(std::move(*prefix)); }, poll);
    return length;
}

void Engine::clear_prefixes(const Poll& poll) {
    core_->run([](Decoder&, Scheduler& scheduler) { scheduler.clear_saved_prefixes(); }, poll);
}

std::vector<MemoryRow> Engine::memory(const Poll& poll) {
    auto rows = std::make_shared<std::vector<MemoryRow>>();
    core_->run(
        [rows](Decoder& decoder, Scheduler& scheduler) {
            *rows = decoder.memory_rows();
            add_bytes(*rows, "CPU", "kv_cache", scheduler.saved_prefix_bytes());
        },
        poll);
    return *rows;
}

std::vector<BreakdownRow> Engine::breakdown(const Poll& poll) {
    auto rows = std::make_shared<std::vector<BreakdownRow>>();
    core_->run([rows](Decoder& decoder, Scheduler&) { *rows = decoder.breakdown(); }, poll);
    return *rows;
}

EngineStats Engine::stats() const {
    require_same_process("the engine");
    return core_->stats();
}

int Engine::embedding_size() const {
    return model_->embedding_length();
}

std::shared_ptr<RoutingTrace> Engine::start_trace(const TraceOptions& options) {
    require_same_process("the engine");
    if (closed()) {
        throw ClosedError("the engine is closed");
    }
    if (!routing_) {
        throw InvalidOptionError("an idle engine computes nothing that could be traced");
    }
    return routing_->start(options, static_cast<std::int64_t>(core_->stats().requests_submitted));
}

void Engine::end_trace(const std::shared_ptr<RoutingTrace>& trace) {
    if (routing_ && !forked()) {
        routing_->end(trace);
    }
}

void Engine::close() {
    if (core_ && !forked()) {
        core_->close();
    }
}

bool Engine::lost() const {
    return !forked() && core_->lost();
}

bool Engine::closed() const {
    return forked() || core_->closed();
}

}  // namespace llama_moe
