#include "scheduler.h"

#include <algorithm>

#include "llama_moe/error.h"
#include "llama_moe/log.h"

namespace llama_moe {
namespace {

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

EngineCore::EngineCore(std::shared_ptr<LoadedModel> model, const ContextOptions& options)
    : model_(std::move(model)), options_(options), vocabulary_(model_->model), devices_(model_->devices) {}

EngineCore::~EngineCore() {
    close();
}

void EngineCore::start(const Poll& poll) {
    // The thread keeps this object: should it be lost in a call that never returns, all it uses stays allocated.
    thread_ = std::thread([self = shared_from_this()] { self->work(); });
    const auto check = [&] {
        check_lost();
        if (poll) {
            poll();
        }
    };
    std::unique_lock<std::mutex> lock(mutex_);
    wait_with_poll(changed_, lock, check, [&] { return started_ || failure_; });
    if (failure_) {
        std::rethrow_exception(failure_);
    }
}

void EngineCore::work() {
    const NativeScope scope;
    try {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            native_call_.emplace(devices_);
        }
        // One row of logits for each sequence: more are never asked for, and the output buffer stays small.
        context_ = std::make_unique<NativeContext>(model_, options_, options_.max_sequences, [this] { return should_abort(); });
        batch_ = std::make_unique<Batch>(context_->limits().batch_size);
        slots_.resize(static_cast<std::size_t>(options_.max_sequences));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            native_call_.reset();
            limits_ = context_->limits();
            started_ = true;
        }
        changed_.notify_all();
        serve();
    } catch (const NativeAbort& abort) {
        if (context_) {
            context_->abandon();
        }
        fail_all(std::make_exception_ptr(DecodeError(std::string("the engine is lost: ") + abort.what())));
    } catch (...) {
        fail_all(std::current_exception());
    }
    {
        // Freeing memory on a worker that died never returns either.
        std::lock_guard<std::mutex> lock(mutex_);
        native_call_.emplace(devices_);
    }
    context_.reset();
    model_.reset();
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    native_call_.reset();
    changed_.notify_all();
}

void EngineCore::serve() {
    while (wait_for_work()) {
        run_tasks();
        release_cancelled();
        admit();
        fill_batch();
        if (batch_->size() == 0) {
            continue;
        }
        const int status = decode();
        if (failed()) {
            return;  // it took so long that everybody was told it would never return
        }
        if (status == 0) {
            sample();
        } else {
            decode_failed(status);
        }
    }
    fail_all(std::make_exception_ptr(ClosedError("the engine is closed")));
}

bool EngineCore::wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || !waiting_.empty() || !tasks_.empty() || active(); });
    return !stopping_;
}

void EngineCore::run_tasks() {
    for (;;) {
        std::shared_ptr<Task> task;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (tasks_.empty()) {
                return;
            }
            task = tasks_.front();
            tasks_.pop_front();
        }
        try {
            task->work(*context_);
        } catch (const NativeAbort&) {
            throw;
        } catch (...) {
            task->error = std::current_exception();
        }
        std::lock_guard<std::mutex> lock(mutex_);
        task->done = true;
        changed_.notify_all();
    }
}

void EngineCore::admit() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t i = 0; i < slots_.size(); i++) {
        while (!slots_[i].request && !waiting_.empty()) {
            auto request = std::move(waiting_.front());
            waiting_.pop_front();
            if (request->cancelled) {
                continue;
            }
            request->started = Clock::now();
            slots_[i].request = std::move(request);
        }
    }
    running_.clear();
    for (const auto& slot : slots_) {
        if (slot.request) {
            running_.push_back(slot.request);
        }
    }
    stats_.requests_running = running_.size();
}

void EngineCore::release_cancelled() {
    for (std::size_t i = 0; i < slots_.size(); i++) {
        if (slots_[i].request && slots_[i].request->cancelled) {
            end(i, "cancelled");
        }
    }
}

// First the newest token of every running request, then prompts in turn. While others generate, prompts get one
// micro-batch a step, so that a long one does not hold them up for longer.
void EngineCore::fill_batch() {
    batch_->clear();
    in_batch_.clear();
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& slot = slots_[i];
        slot.output_index = -1;
        if (slot.request && !slot.request->in_prompt()) {
            slot.output_index = batch_->size();
            batch_->add(slot.request->last_token, slot.request->position, static_cast<int>(i), true);
            in_batch_.push_back(slot.request);
        }
    }
    const int generating = batch_->size();
    int room = limits_.batch_size - generating;
    if (generating > 0) {
        room = std::min(room, limits_.micro_batch_size);
    }
    for (std::size_t n = 0; n < slots_.size() && room > 0; n++) {
        const std::size_t i = (next_prompt_slot_ + n) % slots_.size();
        auto& slot = slots_[i];
        if (!slot.request || !slot.request->in_prompt()) {
            continue;
        }
        Request& request = *slot.request;
        const std::size_t count = std::min(request.prompt.size() - request.prompt_done, static_cast<std::size_t>(room));
        for (std::size_t k = 0; k < count; k++) {
            const bool last = request.prompt_done + k + 1 == request.prompt.size();
            if (last) {
                slot.output_index = batch_->size();
            }
            batch_->add(request.prompt[request.prompt_done + k], request.position + static_cast<int>(k), static_cast<int>(i), last);
        }
        in_batch_.push_back(slot.request);
        room -= static_cast<int>(count);
    }
    batch_->add_output_to_wait_for();
    next_prompt_slot_ = (next_prompt_slot_ + 1) % slots_.size();
}

bool EngineCore::should_abort() const {
    if (stopping_) {
        return true;
    }
    return !in_batch_.empty() && std::all_of(in_batch_.begin(), in_batch_.end(), [](const auto& request) { return request->cancelled.load(); });
}

int EngineCore::decode() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        native_call_.emplace(devices_);
    }
    const auto begin = Clock::now();
    const int status = llama_decode(context_->get(), batch_->get());
    if (status == 0) {
        llama_synchronize(context_->get());
    }
    std::lock_guard<std::mutex> lock(mutex_);
    native_call_.reset();
    stats_.decode_seconds += seconds_since(begin);
    stats_.decode_calls++;
    return status;
}

// The requests of a failed batch end, their sequences are emptied, and the engine goes on.
void EngineCore::decode_failed(int status) {
    const auto error = std::make_exception_ptr(
        DecodeError("llama.cpp could not decode a batch of " + std::to_string(batch_->size()) + " tokens (status " + std::to_string(status) + ")"));
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& request = slots_[i].request;
        if (!request || std::find(in_batch_.begin(), in_batch_.end(), request) == in_batch_.end()) {
            continue;
        }
        const bool aborted = status == 2 && (request->cancelled || stopping_);
        if (!aborted) {
            request->fail(error);
        }
        end(i, "cancelled");
    }
}

void EngineCore::sample() {
    const auto begin = Clock::now();
    std::uint64_t prompt_tokens = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& slot = slots_[i];
        if (!slot.request) {
            continue;
        }
        Request& request = *slot.request;
        const bool was_prompt = request.in_prompt();
        int added = 0;
        for (int k = 0; k < batch_->size(); k++) {
            added += batch_->get().seq_id[k][0] == static_cast<int>(i) ? 1 : 0;
        }
        request.position += added;
        if (was_prompt) {
            request.prompt_done += static_cast<std::size_t>(added);
            prompt_tokens += static_cast<std::uint64_t>(added);
        }
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stats_.prompt_tokens += prompt_tokens;
    }
    for (std::size_t i = 0; i < slots_.size(); i++) {
        if (slots_[i].request && slots_[i].output_index >= 0) {
            sample_slot(i);
        }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.sample_seconds += seconds_since(begin);
}

void EngineCore::sample_slot(std::size_t index) {
    auto& slot = slots_[index];
    Request& request = *slot.request;
    const float* logits = llama_get_logits_ith(context_->get(), slot.output_index);
    try {
        if (logits == nullptr) {
            throw DecodeError("llama.cpp gave no logits");
        }
        const std::int32_t token = request.sampler.sample(logits);
        if (request.generated == 0) {
            request.first_token = Clock::now();
        }
        if (llama_vocab_is_eog(vocabulary_.vocab, token)) {
            request.deliver(with_logprobs(request, request.assembler.finish()));
            end(index, "stop");
            return;
        }
        if (request.logprobs) {
            request.sampled_logprobs.emplace_back(static_cast<std::size_t>(request.generated),
                                                  log_probabilities(logits, vocabulary_.size, token, *request.logprobs));
        }
        request.generated++;
        request.last_token = token;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stats_.generated_tokens++;
        }
        request.deliver(with_logprobs(request, request.assembler.push(token, token_text(token, request))));
        if (request.assembler.stopped()) {
            end(index, "stop");
        } else if ((request.max_tokens && request.generated >= *request.max_tokens) || request.position >= limits_.context_size) {
            request.deliver(with_logprobs(request, request.assembler.finish()));
            end(index, request.assembler.stopped() ? "stop" : "length");
        }
    } catch (const NativeAbort&) {
        throw;
    } catch (...) {
        request.fail(std::current_exception());
        end(index, "cancelled");
    }
}

std::vector<GeneratedToken> EngineCore::with_logprobs(Request& request, std::vector<TextPiece> pieces) const {
    std::vector<GeneratedToken> tokens;
    for (auto& piece : pieces) {
        GeneratedToken token{piece.token, std::move(piece.text), std::nullopt, {}};
        auto& logprobs = request.sampled_logprobs;
        while (!logprobs.empty() && logprobs.front().first < piece.index) {
            logprobs.pop_front();
        }
        if (!logprobs.empty() && logprobs.front().first == piece.index) {
            token.logprob = logprobs.front().second.logprob;
            for (const auto& [id, logprob] : logprobs.front().second.top) {
                Utf8Assembler utf8;
                std::string text = utf8.push(token_text(id, request));
                text += utf8.finish();
                token.top.push_back({id, std::move(text), logprob});
            }
        }
        tokens.push_back(std::move(token));
    }
    return tokens;
}

std::string EngineCore::token_text(std::int32_t token, const Request& request) const {
    const auto& preserved = request.preserved_tokens;
    const bool special = std::find(preserved.begin(), preserved.end(), token) != preserved.end();
    char buffer[64];
    const auto size = llama_token_to_piece(vocabulary_.vocab, token, buffer, sizeof(buffer), 0, special);
    if (size >= 0) {
        return {buffer, static_cast<std::size_t>(size)};
    }
    std::string text(static_cast<std::size_t>(-size), '\0');
    llama_token_to_piece(vocabulary_.vocab, token, text.data(), -size, 0, special);
    return text;
}

void EngineCore::end(std::size_t index, const std::string& reason) {
    auto& slot = slots_[index];
    llama_memory_seq_rm(context_->memory(), static_cast<llama_seq_id>(index), -1, -1);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stats_.requests_finished++;
        stats_.requests_running--;
    }
    slot.request->finish(reason);  // last: who reads the result finds the engine's figures up to date
    slot.request.reset();
    slot.output_index = -1;
}

void EngineCore::fail_all(const std::exception_ptr& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) {
        failure_ = error;
    }
    stats_.requests_finished += stats_.requests_running + waiting_.size();
    stats_.requests_running = 0;
    // What close() ends was asked for: those generations are cancelled, not failed.
    const auto finish = [&](Request& request) { stopping_ ? request.finish("cancelled") : request.fail(error); };
    for (const auto& request : running_) {
        finish(*request);
    }
    for (const auto& request : waiting_) {
        finish(*request);
    }
    waiting_.clear();
    running_.clear();
    for (const auto& task : tasks_) {
        task->error = error;
        task->done = true;
    }
    tasks_.clear();
    changed_.notify_all();
}

void EngineCore::check_open() const {
    if (closed_) {
        throw ClosedError("the engine is closed");
    }
    if (failure_) {
        std::rethrow_exception(failure_);
    }
}

void EngineCore::submit(const std::shared_ptr<Request>& request) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        check_open();
        waiting_.push_back(request);
        stats_.requests_submitted++;
    }
    changed_.notify_all();
}

void EngineCore::cancel(Request& request) {
    request.cancelled = true;
    request.finish("cancelled");
    {
        // One that still waits needs nothing of the engine's thread.
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& other) { return other.get() == &request; });
        if (found != waiting_.end()) {
            waiting_.erase(found);
            stats_.requests_finished++;
        }
    }
    changed_.notify_all();
}

void EngineCore::run(std::function<void(NativeContext&)> work, const Poll& poll) {
    auto task = std::make_shared<Task>();
    task->work = std::move(work);
    std::unique_lock<std::mutex> lock(mutex_);
    check_open();
    tasks_.push_back(task);
    changed_.notify_all();
    const auto check = [&] {
        check_lost();
        if (poll) {
            poll();
        }
    };
    wait_with_poll(changed_, lock, check, [&] { return task->done; });
    if (task->error) {
        std::rethrow_exception(task->error);
    }
}

void EngineCore::check_lost() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!native_call_ || !native_call_->gave_up() || failure_) {
            return;
        }
    }
    fail_all(std::make_exception_ptr(DecodeError("a device failed and the engine is lost: " + AbortWatch::message())));
}

void EngineCore::close() {
    std::lock_guard<std::mutex> close_lock(close_mutex_);
    bool lost = false;
    {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        stopping_ = true;
        changed_.notify_all();
        if (!thread_.joinable()) {
            return;
        }
        while (!changed_.wait_for(lock, kPollInterval, [&] { return ended_; })) {
            if (native_call_ && native_call_->gave_up()) {
                lost = true;
                break;
            }
        }
    }
    if (lost) {
        fail_all(std::make_exception_ptr(DecodeError("a device failed: " + AbortWatch::message())));
        thread_.detach();
        log_line(LogLevel::error, "an engine could not be freed: its device failed");
    } else {
        thread_.join();
    }
}

bool EngineCore::closed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
}

bool EngineCore::failed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return failure_ != nullptr;
}

bool EngineCore::active() const {
    return std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return slot.request != nullptr; });
}

EngineStats EngineCore::stats() const {
    std::lock_guard<std::mutex> lock(mutex_);
    EngineStats stats = stats_;
    stats.requests_waiting = waiting_.size();
    return stats;
}

}  // namespace llama_moe
