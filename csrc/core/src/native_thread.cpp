#include "native_thread.h"

#include <unistd.h>

#include <optional>

#include "ggml.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "openmp_threads.h"

namespace llama_moe {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kAbortGrace{2};
// How long a worker that is asked whether it still answers may take.
constexpr std::chrono::seconds kPingLimit{5};
// How long a wait that was interrupted stays for the task to stop, so that the usual case leaves nothing running.
constexpr std::chrono::milliseconds kInterruptGrace{100};

thread_local int t_native_depth = 0;

struct ForeignAborts {
    std::mutex mutex;
    std::uint64_t count = 0;
    std::string message;
};

// Never destroyed: parked threads may outlive static destruction.
ForeignAborts& foreign_aborts() {
    static auto* aborts = new ForeignAborts;
    return *aborts;
}

void on_abort(const char* message) {
    if (t_native_depth > 0) {
        throw NativeAbort(message);
    }
    {
        auto& aborts = foreign_aborts();
        std::lock_guard<std::mutex> lock(aborts.mutex);
        aborts.count++;
        aborts.message = message;
    }
    log_line(LogLevel::error, message);
    for (;;) {
        pause();
    }
}

}  // namespace

void install_abort_handler() {
    ggml_set_abort_callback(on_abort);
}

NativeScope::NativeScope() {
    t_native_depth++;
}

NativeScope::~NativeScope() {
    t_native_depth--;
}

AbortWatch::AbortWatch(std::vector<ggml_backend_dev_t> devices) : devices_(std::move(devices)) {
    auto& aborts = foreign_aborts();
    std::lock_guard<std::mutex> lock(aborts.mutex);
    seen_ = aborts.count;
}

bool AbortWatch::gave_up() {
    return any_failed(devices_) || aborted() || unanswered();
}

bool AbortWatch::aborted() {
    std::string message;
    std::uint64_t count = 0;
    {
        auto& aborts = foreign_aborts();
        std::lock_guard<std::mutex> lock(aborts.mutex);
        count = aborts.count;
        message = aborts.message;
    }
    if (count == seen_) {
        return false;
    }
    if (noticed_ == Clock::time_point{}) {
        noticed_ = Clock::now();
    }
    if (Clock::now() - noticed_ <= kAbortGrace) {
        return false;
    }
    if (!is_remote_failure(message)) {
        return true;
    }
    const auto unclear = find_failed(devices_, message);
    seen_ = count;
    noticed_ = {};
    if (!any_failed(devices_) && !unclear.empty()) {
        ask(unclear);
    }
    return any_failed(devices_);  // else that was another call's worker
}

bool AbortWatch::unanswered() {
    const auto now = Clock::now();
    if (!ping_) {
        if (any_remote(devices_) && now - heard_ > answer_limit(devices_)) {
            ask(devices_);
        }
        return false;
    }
    if (ping_->missing().empty()) {  // the call only takes long
        ping_.reset();
        heard_ = now;
        return false;
    }
    if (now - asked_ <= kPingLimit) {
        return false;
    }
    ping_->fail_missing(std::chrono::duration_cast<std::chrono::seconds>(now - heard_));
    return true;
}

void AbortWatch::ask(const std::vector<ggml_backend_dev_t>& devices) {
    ping_ = std::make_unique<Ping>(devices);
    asked_ = Clock::now();
}

std::string AbortWatch::reason() const {
    const std::string failed = describe_failed(devices_);
    return failed.empty() ? "a device failed: " + message() : failed;
}

std::string AbortWatch::message() {
    auto& aborts = foreign_aborts();
    std::lock_guard<std::mutex> lock(aborts.mutex);
    return aborts.message;
}

struct NativeThread::Job {
    std::function<void()> task;
    std::exception_ptr error;
    bool done = false;
};

struct NativeThread::Shared {
    mutable std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::shared_ptr<Job>> jobs;
    // Of the job that runs, not of who waits: a job behind it, or one whose caller left, is lost with it.
    std::optional<AbortWatch> watch;
    std::vector<ggml_backend_dev_t> devices;
    bool stopping = false;
    bool ended = false;
    bool lost = false;
    std::string lost_reason;

    void work() {
        NativeScope scope;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wait_for_work(changed, lock, [&] { return stopping || !jobs.empty(); });
            if (jobs.empty()) {
                ended = true;
                changed.notify_all();
                return;
            }
            auto job = jobs.front();
            watch.emplace(devices);
            lock.unlock();
            try {
                job->task();
            } catch (...) {
                job->error = std::current_exception();
            }
            job->task = nullptr;  // frees what the task owned, on this thread
            lock.lock();
            watch.reset();
            jobs.pop_front();
            job->done = true;
            changed.notify_all();
        }
    }

    // Notices that the running job will never end. `mutex` is held.
    void check_lost() {
        if (!lost && watch && watch->gave_up()) {
            lost = true;
            lost_reason = watch->reason();
            changed.notify_all();
        }
    }
};

NativeThread::NativeThread(std::vector<ggml_backend_dev_t> devices) : shared_(std::make_shared<Shared>()) {
    shared_->devices = std::move(devices);
    thread_ = std::thread([shared = shared_] { shared->work(); });
}

NativeThread::~NativeThread() {
    std::unique_lock<std::mutex> lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    const auto deadline = any_remote(shared_->devices) ? Clock::now() + kCloseLimit : Clock::time_point::max();
    while (!shared_->lost && !shared_->changed.wait_for(lock, kPollInterval, [&] { return shared_->ended; })) {
        shared_->check_lost();
        if (!shared_->lost && Clock::now() > deadline) {
            shared_->lost = true;
            shared_->lost_reason = not_answered(shared_->devices);
        }
    }
    const bool lost = shared_->lost;
    lock.unlock();
    if (lost) {
        thread_.detach();
    } else {
        thread_.join();
    }
}

bool NativeThread::lost() const {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    return shared_->lost;
}

void NativeThread::run(std::function<void()> task, const Poll& poll, const std::function<void()>& interrupt) {
    require_same_process("this object");
    auto job = std::make_shared<Job>();
    job->task = std::move(task);

    std::unique_lock<std::mutex> lock(shared_->mutex);
    if (shared_->lost) {
        throw DecodeError("this object was lost: " + shared_->lost_reason);
    }
    shared_->jobs.push_back(job);
    shared_->changed.notify_all();

    const auto check = [&] {
        {
            std::lock_guard<std::mutex> guard(shared_->mutex);
            shared_->check_lost();
        }
        if (poll) {
            poll();
        }
    };
    try {
        wait_with_poll(shared_->changed, lock, check, [&] { return job->done || shared_->lost; });
    } catch (...) {
        if (lock.owns_lock()) {
            lock.unlock();
        }
        if (interrupt) {
            interrupt();
        }
        lock.lock();
        shared_->changed.wait_for(lock, kInterruptGrace, [&] { return job->done || shared_->lost; });
        throw;
    }
    if (!job->done) {
        throw DecodeError(shared_->lost_reason);
    }
    if (job->error) {
        std::rethrow_exception(std::move(job->error));  // moved, here and below: the caller alone owns what it catches
    }
}

void run_native(std::function<void()> task, const Poll& poll, const std::function<void()>& interrupt,
                std::vector<ggml_backend_dev_t> devices) {
    require_same_process("llama.cpp");
    // The thread outlives an interrupted wait: its owner is whichever of the two ends last.
    struct Abandonable {
        std::mutex mutex;
        std::condition_variable changed;
        std::exception_ptr error;
        bool done = false;
    };
    auto state = std::make_shared<Abandonable>();
    AbortWatch watch(std::move(devices));
    std::thread([state, task = std::move(task)]() mutable {
        NativeScope scope;
        std::exception_ptr error;
        try {
            task();
        } catch (...) {
            error = std::current_exception();
        }
        task = nullptr;
        std::lock_guard<std::mutex> lock(state->mutex);
        state->error = std::move(error);
        state->done = true;
        state->changed.notify_all();
    }).detach();

    const auto check = [&] {
        if (watch.gave_up()) {
            throw DecodeError(watch.reason());
        }
        if (poll) {
            poll();
        }
    };
    std::unique_lock<std::mutex> lock(state->mutex);
    try {
        wait_with_poll(state->changed, lock, check, [&] { return state->done; });
    } catch (...) {
        if (lock.owns_lock()) {
            lock.unlock();
        }
        if (interrupt) {
            interrupt();
        }
        lock.lock();
        state->changed.wait_for(lock, kInterruptGrace, [&] { return state->done; });
        throw;
    }
    if (state->error) {
        std::rethrow_exception(std::move(state->error));
    }
}

}  // namespace llama_moe
