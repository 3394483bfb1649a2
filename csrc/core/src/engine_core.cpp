#include "engine_core.h"

#include <algorithm>

#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "openmp_threads.h"

namespace llama_moe {
namespace {

// What was thrown through llama.cpp ends the engine, whoever else is told.
void rethrow_abort(const std::exception_ptr& error) {
    if (!error) {
        return;
    }
    try {
        std::rethrow_exception(error);
    } catch (const NativeAbort&) {
        throw;
    } catch (...) {
    }
}

}  // namespace

EngineCore::EngineCore(std::shared_ptr<LoadedModel> model, const EngineOptions& options, std::vector<ggml_backend_dev_t> devices,
                       MakeDecoder make_decoder)
    : model_(std::move(model)),
      options_(options),
      vocabulary_(model_->model),
      devices_(std::move(devices)),
      make_decoder_(std::move(make_decoder)) {}

EngineCore::~EngineCore() {
    close();
}

Poll EngineCore::checked(const Poll& poll) {
    return [this, poll] {
        check_lost();
        if (poll) {
            poll();
        }
    };
}

void EngineCore::start(const Poll& poll) {
    // The thread keeps this object: should it be lost in a call that never returns, all it uses stays allocated.
    thread_ = std::thread([self = shared_from_this()] { self->work(); });
    std::unique_lock<std::mutex> lock(mutex_);
    wait_with_poll(changed_, lock, checked(poll), [&] { return started_ || failure_; });
    if (failure_) {
        std::rethrow_exception(failure_);
    }
}

void EngineCore::set_native_call(bool running) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (running) {
        native_call_.emplace(devices_);
    } else {
        native_call_.reset();
    }
}

void EngineCore::work() {
    const NativeScope scope;
    try {
        set_native_call(true);
        decoder_ = std::exchange(make_decoder_, nullptr)([this] { return stopping_ || (scheduler_ && scheduler_->should_abort()); });
        pool_ = std::make_unique<WorkerPool>(std::min(decoder_->limits().threads, decoder_->limits().max_sequences));
        scheduler_ = std::make_unique<Scheduler>(*decoder_, vocabulary_, *pool_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            native_call_.reset();
            limits_ = decoder_->limits();
            started_ = true;
        }
        changed_.notify_all();
        serve();
    } catch (const NativeAbort& abort) {
        if (decoder_) {
            decoder_->abandon();
        }
        fail_all(std::make_exception_ptr(DecodeError(std::string("the engine is lost: ") + abort.what())));
    } catch (...) {
        fail_all(std::current_exception());
    }
    // Freeing memory on a worker that died never returns either.
    set_native_call(true);
    scheduler_.reset();
    pool_.reset();
    decoder_.reset();
    model_.reset();
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    native_call_.reset();
    changed_.notify_all();
}

void EngineCore::serve() {
    while (wait_for_work()) {
        run_tasks();
        scheduler_->release_ended();
        admit();
        set_native_call(true);
        scheduler_->step();
        set_native_call(false);
        if (failed()) {
            return;  // it took so long that everybody was told it would never return
        }
        tell_ended();
    }
    fail_all(std::make_exception_ptr(ClosedError("the engine is closed")));
}

bool EngineCore::wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    llama_moe::wait_for_work(changed_, lock, [&] { return stopping_ || !waiting_.empty() || !tasks_.empty() || scheduler_->active(); });
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
        set_native_call(true);
        try {
            task->work(*decoder_, *scheduler_);
        } catch (...) {
            task->error = std::current_exception();
        }
        set_native_call(false);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task->done = true;
            changed_.notify_all();
        }
        rethrow_abort(task->error);
    }
}

void EngineCore::admit() {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto dropped = std::remove_if(waiting_.begin(), waiting_.end(), [](const auto& request) { return request->given_up(); });
    bool admitted = dropped != waiting_.end();
    ended_waiting_ += static_cast<std::uint64_t>(waiting_.end() - dropped);
    waiting_.erase(dropped, waiting_.end());
    while (!waiting_.empty() && scheduler_->accepts()) {
        auto request = std::move(waiting_.front());
        waiting_.pop_front();
        admitted = true;
        scheduler_->admit(std::move(request));
    }
    if (admitted) {
        running_ = scheduler_->running();
        stats_ = scheduler_->stats();
        changed_.notify_all();  // who waits for room in the queue
    }
}

// Who reads a result finds the engine's figures up to date.
void EngineCore::tell_ended() {
    auto ended = scheduler_->take_ended();
    auto preempted = scheduler_->take_preempted();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stats_ = scheduler_->stats();
        waiting_.insert(waiting_.begin(), std::make_move_iterator(preempted.begin()), std::make_move_iterator(preempted.end()));
        if (!ended.empty() || !preempted.empty()) {
            running_ = scheduler_->running();
        }
    }
    for (auto& [request, reason, error] : ended) {
        error ? request->fail(std::move(error)) : request->finish(reason);
    }
}

void EngineCore::fail_all(const std::exception_ptr& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) {
        failure_ = error;
    }
    stats_.requests_finished += stats_.requests_running;
    stats_.requests_running = 0;
    ended_waiting_ += waiting_.size();
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

void EngineCore::submit(const std::shared_ptr<Request>& request, bool wait, const Poll& poll) {
    std::unique_lock<std::mutex> lock(mutex_);
    check_open();
    const auto limit = static_cast<std::size_t>(options_.max_queue);
    if (wait) {
        const bool room = wait_with_poll(changed_, lock, checked(poll), [&] { return closed_ || failure_ || waiting_.size() < limit; },
                                         request->deadline);
        check_open();
        if (!room) {
            lock.unlock();
            request->fail_by_timeout();
            std::rethrow_exception(request->error);
        }
    } else if (waiting_.size() >= limit) {
        throw QueueFullError("the queue is full: " + std::to_string(waiting_.size()) + " requests wait (max_queue is " +
                             std::to_string(options_.max_queue) + ") for " + std::to_string(limits_.max_sequences) + " sequences; try again later");
    }
    request->number = static_cast<std::int64_t>(submitted_);
    waiting_.push_back(request);
    submitted_++;
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
            ended_waiting_++;
        }
    }
    changed_.notify_all();
}

void EngineCore::run(std::function<void(Decoder&, Scheduler&)> work, const Poll& poll) {
    require_same_process("the engine");
    auto task = std::make_shared<Task>();
    task->work = std::move(work);
    std::unique_lock<std::mutex> lock(mutex_);
    check_open();
    tasks_.push_back(task);
    changed_.notify_all();
    wait_with_poll(changed_, lock, checked(poll), [&] { return task->done; });
    if (task->error) {
        std::rethrow_exception(task->error);
    }
}

void EngineCore::check_lost() {
    std::string reason;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!native_call_ || !native_call_->gave_up() || failure_) {
            return;
        }
        reason = native_call_->reason();
    }
    fail_all(std::make_exception_ptr(DecodeError("the engine is lost: " + reason)));
}

void EngineCore::close() {
    std::lock_guard<std::mutex> close_lock(close_mutex_);
    std::string lost;
    {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        stopping_ = true;
        changed_.notify_all();
        if (!thread_.joinable()) {
            return;
        }
        using Clock = std::chrono::steady_clock;
        const auto deadline = any_remote(devices_) ? Clock::now() + kCloseLimit : Clock::time_point::max();
        while (lost.empty() && !changed_.wait_for(lock, kPollInterval, [&] { return ended_; })) {
            if (native_call_ && native_call_->gave_up()) {
                lost = native_call_->reason();
            } else if (Clock::now() > deadline) {
                lost = not_answered(devices_);
            }
        }
    }
    if (lost.empty()) {
        thread_.join();
    } else {
        fail_all(std::make_exception_ptr(DecodeError("the engine is lost: " + lost)));
        thread_.detach();
        log_line(LogLevel::error, "an engine could not be freed: " + lost);
    }
}

bool EngineCore::closed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
}

bool EngineCore::lost() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return failure_ && !closed_;
}

bool EngineCore::failed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return failure_ != nullptr;
}

EngineStats EngineCore::stats() const {
    std::lock_guard<std::mutex> lock(mutex_);
    EngineStats stats = stats_;
    stats.requests_submitted = submitted_;
    stats.requests_finished += ended_waiting_;
    stats.requests_waiting = waiting_.size();
    return stats;
}

}  // namespace llama_moe
