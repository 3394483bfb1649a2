#include "llama_moe/engine.h"

#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/process.h"
#include "native_thread.h"
#include "scheduler.h"

namespace llama_moe {
namespace {

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
    const auto check = [&] {
        engine_->check_lost();
        if (poll) {
            poll();
        }
    };
    Request& request = *request_;
    std::unique_lock<std::mutex> lock(request.mutex);
    const auto has_news = [&] { return request.finished || !request.ready.empty(); };
    if (wait) {
        const WaitingThread waiting(request);
        wait_with_poll(request.changed, lock, check, has_news, request.deadline);
    }
    if (!has_news() && request.past_deadline()) {
        lock.unlock();
        request.fail_by_timeout();
        engine_->cancel(request);
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

std::shared_ptr<Engine> Engine::create(const std::shared_ptr<Model>& model, const ContextOptions& options, const Poll& poll) {
    require_same_process("the model");
    options.validate();
    if (options.batch_size < options.max_sequences) {
        throw InvalidOptionError("batch_size is " + std::to_string(options.batch_size) + "; an engine needs at least one token for each of its " +
                                 std::to_string(options.max_sequences) + " sequences");
    }
    std::shared_ptr<Engine> engine(new Engine);
    live_objects().engines++;
    engine->model_ = model;
    engine->core_ = std::make_shared<EngineCore>(model->acquire(), options);
    engine->core_->start(poll);
    engine->limits_ = engine->core_->limits();
    model->add_user(engine);
    return engine;
}

Engine::~Engine() {
    close();
    live_objects().engines--;
}

std::unique_ptr<Generation> Engine::submit(std::vector<std::int32_t> prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery) {
    require_same_process("the engine");
    sampling.validate();
    delivery.validate();
    if (closed()) {
        throw ClosedError("the engine is closed");
    }
    const auto& vocabulary = core_->vocabulary();
    if (prompt.empty()) {
        throw InvalidOptionError("the prompt is empty; give at least one token");
    }
    for (std::size_t i = 0; i < prompt.size(); i++) {
        if (prompt[i] < 0 || prompt[i] >= vocabulary.size) {
            throw InvalidOptionError("prompt[" + std::to_string(i) + "] is " + std::to_string(prompt[i]) + "; the vocabulary has the tokens 0 to " +
                                     std::to_string(vocabulary.size - 1));
        }
    }
    if (prompt.size() > static_cast<std::size_t>(limits_.context_size)) {
        throw ContextFullError("the prompt has " + std::to_string(prompt.size()) + " tokens; the context holds " +
                               std::to_string(limits_.context_size) + " for each sequence");
    }
    const auto loaded = model_->acquire();  // the vocabulary stays while a sampler is made with it
    const NativeScope scope;
    auto request = std::make_shared<Request>(std::move(prompt), sampling, vocabulary, limits_.context_size, delivery);
    core_->submit(request);
    return std::make_unique<Generation>(core_, std::move(request));
}

std::unique_ptr<Generation> Engine::submit(const std::string& prompt, const SamplingOptions& sampling, const DeliveryOptions& delivery) {
    require_same_process("the engine");
    if (closed()) {
        throw ClosedError("the engine is closed");
    }
    return submit(model_->tokenize(prompt, /*add_special=*/true, /*parse_special=*/true), sampling, delivery);
}

std::vector<MemoryRow> Engine::memory(const Poll& poll) {
    auto rows = std::make_shared<std::vector<MemoryRow>>();
    core_->run([rows](NativeContext& context) { *rows = context.memory_rows(); }, poll);
    return *rows;
}

std::vector<BreakdownRow> Engine::breakdown(const Poll& poll) {
    auto rows = std::make_shared<std::vector<BreakdownRow>>();
    core_->run([rows](NativeContext& context) { *rows = context.breakdown(); }, poll);
    return *rows;
}

EngineStats Engine::stats() const {
    require_same_process("the engine");
    return core_->stats();
}

void Engine::close() {
    if (core_ && !forked()) {
        core_->close();
    }
}

bool Engine::closed() const {
    return forked() || core_->closed();
}

}  // namespace llama_moe
